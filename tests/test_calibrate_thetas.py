"""Top-Theta calibration: exactly k above each row's threshold, means by length, what is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx.attention.dense import dense_attention
from sparsefx.attention.meaning import scores, softmax, theta_attention
from sparsefx.attention.spec import Theta
from sparsefx.calibrate.attention.thetas import BAND, COUNT, THETA, ThetaStatistics, of_layer
from sparsefx.calibrate.attention.tiles import Call
from tests.attention_cases import Sizes, masks, skipping_inputs

SIZES = Sizes(queries=70, keys=70)
K, SCALE = 8, 0.25


def call_of(seed: int = 0, mask: Tensor | None = None, sizes: Sizes = SIZES) -> Call:
    q, k, v = skipping_inputs(sizes, seed)
    return Call(q, k, v, mask, True, SCALE, BAND)


def rows_of(call: Call) -> Tensor:
    return scores(call.q, call.k, call.mask, call.is_causal, call.scale, 0)


def calibrated(spec: Theta, *calls: Call) -> ThetaStatistics:
    found = ThetaStatistics.empty(spec, 4)
    for call in calls:
        found.add(call)
    return found


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_single_row_is_cut_at_exactly_k(placement: str) -> None:
    sizes = Sizes(batch=1, queries=1, keys=70)
    call = call_of(3, sizes=sizes)
    found = calibrated(Theta(k=K, placement=placement), call).thresholds()
    x = rows_of(call)[0, :, 0]
    x = softmax(x) if placement == "post" else x
    theta = torch.tensor(found.theta, dtype=torch.float64)
    assert found.lengths == (70,)
    # float32 thresholds may round past the k-th element, never past more.
    assert (x > theta - 1e-12).sum(-1).tolist() == [K + 1] * 4
    assert (x > theta + 1e-12).sum(-1).tolist() == [K] * 4


def test_thresholds_are_means_plus_deviations_by_length() -> None:
    calls = [call_of(seed) for seed in range(3)]
    spec = Theta(k=K, deviations=0.5)
    found = calibrated(spec, *calls)
    x = torch.cat([rows_of(call) for call in calls])
    boundary = x.topk(K + 1, -1).values[..., K]  # [6, heads, rows]
    lengths = torch.arange(1, 71)
    point = (8 * (lengths / K).log2()).round()
    expected = []
    for each in point[lengths > K].unique():
        rows = boundary[:, :, (point == each) & (lengths > K)].transpose(0, 1).flatten(1)
        expected.append(rows.mean(1) + 0.5 * rows.std(1, correction=0))
    theta = torch.tensor(found.thresholds().theta, dtype=torch.float64)
    torch.testing.assert_close(theta, torch.stack(expected, 1))
    assert found.table[COUNT].sum() == 6 * 4 * (70 - K)


def test_lengths_grow_with_the_data_and_stay_in_order() -> None:
    long = call_of(1, sizes=Sizes(queries=150, keys=150))
    found = calibrated(Theta(k=K), call_of(), long).thresholds()
    assert list(found.lengths) == sorted(set(found.lengths))
    assert found.lengths[0] == K + 1 and 140 < found.lengths[-1] <= 150
    assert found.keys == (70, 150)


def test_hidden_keys_are_not_counted() -> None:
    mask = masks(SIZES, 1)["bool"]
    assert mask is not None
    found = calibrated(Theta(k=K), call_of(0, mask))
    visible = (rows_of(call_of(0, mask)) != float("-inf")).sum(-1)
    assert found.table[COUNT].sum() == (visible > K).sum()
    assert found.table[THETA].isfinite().all()


@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("denominator", ["exact", "exp_threshold", "offline", "none"])
@pytest.mark.parametrize("v_mean", [True, False])
def test_measured_error_is_that_of_the_operator(
    placement: str, denominator: str, v_mean: bool
) -> None:
    spec = Theta(k=K, placement=placement, denominator=denominator, v_mean=v_mean)
    call = call_of()
    statistics = calibrated(spec, call, call_of(1))
    result = statistics.measure(call)
    found = statistics.thresholds()
    lost = torch.tensor(found.lost) if found.lost else None
    expected = theta_attention(
        call.q,
        call.k,
        call.v,
        None,
        torch.tensor(found.lengths),
        torch.tensor(found.theta),
        lost,
        True,
        SCALE,
        0,
        K,
        placement,
        denominator,
        v_mean,
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)
    dense = dense_attention(call.q, call.k, call.v, None, True, SCALE, 0)
    error = float((expected - dense).norm() / dense.norm())
    assert found.error == pytest.approx(error, rel=1e-6)
    assert found.kept is not None and 0.1 < found.kept < 0.5
    assert (denominator == "offline") == bool(found.lost)


def test_later_layers_see_exact_top_k() -> None:
    """With the exact denominator the observed result is post-softmax top-k of each row."""
    call = call_of()
    spec = Theta(k=K, v_mean=False)
    result = calibrated(spec, call) and ThetaStatistics.empty(spec, 4).add(call)
    x = rows_of(call)
    p = softmax(x).masked_fill(x <= x.topk(K + 1, -1).values[..., K:], 0)
    short = torch.arange(1, 71) <= K
    p[..., short, :] = softmax(x)[..., short, :]
    torch.testing.assert_close(result, p @ call.v.repeat_interleave(2, 1))


def test_offline_lost_mass_is_the_mean_of_what_top_k_drops() -> None:
    call = call_of(0, sizes=Sizes(batch=1, queries=1, keys=70))
    found = calibrated(Theta(k=K, denominator="offline"), call).thresholds()
    x = rows_of(call)[0, :, 0]
    weight = (x - x.amax(-1, keepdim=True)).exp()
    expected = weight.sum(-1) - weight.topk(K, -1).values.sum(-1)
    torch.testing.assert_close(torch.tensor(found.lost)[:, 0].double(), expected)


def test_rows_no_longer_than_k_stay_dense() -> None:
    call = call_of(0, sizes=Sizes(queries=20, keys=20))
    statistics = calibrated(Theta(k=32), call)
    result = statistics.measure(call)
    torch.testing.assert_close(
        result, dense_attention(call.q, call.k, call.v, None, True, SCALE, 0)
    )
    found = statistics.thresholds()
    assert found.lengths == (32,) and found.kept is None
    # Longer rows than calibrated lose nothing either.
    long = call_of(0)
    same = theta_attention(
        long.q, long.k, long.v, None, torch.tensor(found.lengths), torch.tensor(found.theta), None,
        True, SCALE, 0, 32, "pre", "exact", True,
    )  # fmt: skip
    torch.testing.assert_close(same, dense_attention(long.q, long.k, long.v, None, True, SCALE, 0))


def test_the_first_layers_keep_more() -> None:
    spec = Theta(k=K, dense_k=32, dense_layers=2)
    assert [of_layer(spec, number).k for number in range(4)] == [32, 32, K, K]
    assert of_layer(replace(spec, k=64), 0).k == 64
