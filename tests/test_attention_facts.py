"""Thresholds in the words of the report, and the fields of its rows."""

from dataclasses import replace

from sparsefx.attention.facts import in_words, row_facts
from sparsefx.report import Report
from tests.checkpoints import SKIP, THETA
from tests.test_report_attention import SKIPPING


def test_skip_thresholds_in_words() -> None:
    assert in_words(SKIP) == (
        "prefill factors 0..3.5, decode 0.25..12, R2 0.98, output error 1% in prefill, "
        "calibrated 128..2048 keys"
    )
    both = replace(SKIP, r2=(0.98, 0.5), error=(0.011, 0.25))
    assert "R2 0.50, output error 1.1% in prefill and 25% in decode" in in_words(both)
    given = replace(SKIP, prefill=(4.0,) * 3, keys=(0, 0), r2=(None, None), error=(None, None))
    assert in_words(given) == "prefill factors 4, decode 0.25..12, not calibrated"


def test_theta_thresholds_in_words() -> None:
    words = "keeps 4% of longer rows, output error 2%, calibrated 64..2048 keys"
    assert in_words(THETA) == f"theta -1e+300..3, {words}"
    bare = replace(THETA, kept=None, error=None, keys=(2048, 2048))
    assert in_words(bare) == "theta -1e+300..3, calibrated 2048 keys"


def test_a_row_takes_the_figures_of_its_phase() -> None:
    found = replace(SKIP, skipped=(0.7, 0.4), lost_mass=(0.004, 0.03))
    prefill, decode = row_facts(found, is_decode=False), row_facts(found, is_decode=True)
    assert (prefill["skipped"], prefill["lost_mass"]) == (0.7, 0.004)
    assert (decode["skipped"], decode["lost_mass"]) == (0.4, 0.03)
    assert row_facts(THETA, is_decode=True)["skipped"] == 1 - 0.04
    for facts in (prefill, decode, row_facts(THETA, is_decode=False)):
        row = replace(SKIPPING, **facts)  # type: ignore[arg-type]  # fields of a row
        assert Report("t", [row]).check() == []
        assert str(facts["thresholds"]) in " ".join(str(Report("t", [row])).split())
