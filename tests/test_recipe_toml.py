"""A recipe travels through TOML unchanged; what TOML misspells is named, with file and key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx.attention.spec import (
    DENOMINATORS,
    ORDERS,
    PER,
    PLACEMENTS,
    TILES,
    AttentionPattern,
    SkipSoftmax,
    Theta,
)
from sparsefx.criteria import DSnoT, Magnitude, Random, SparseGPT, Wanda
from sparsefx.errors import InvalidPattern, InvalidRecipe
from sparsefx.patterns import Columns, Rows
from sparsefx.quantise import LARGEST
from sparsefx.spec import NM, Block, Pattern, Recipe, Unstructured

SPARSITY = st.floats(0, 1, exclude_max=True)
PLAIN = st.one_of(
    st.just(Magnitude()),
    st.just(Wanda()),
    st.builds(Random, st.integers(0, 2**63 - 1)),
    st.builds(SparseGPT, st.floats(1e-9, 1e9), st.integers(1, 4096)),
)
CRITERIA = PLAIN | st.builds(DSnoT, PLAIN, st.integers(1, 99), st.floats(0, 9), st.booleans())
KINDS = st.sampled_from(["", *LARGEST])
STORED = st.one_of(
    st.fixed_dictionaries({"values": KINDS}),
    st.fixed_dictionaries(
        {"values": KINDS.filter(bool), "group": st.integers(0, 99).map(lambda count: 16 * count)}
    ),
)
PATTERNS = st.one_of(
    st.builds(Unstructured, SPARSITY, CRITERIA),
    st.integers(2, 99).flatmap(
        lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m), CRITERIA)
    ),
    st.builds(Block, st.integers(1, 128), st.integers(1, 128), SPARSITY, PLAIN, values=KINDS),
    st.builds(Rows, SPARSITY, PLAIN),
    st.builds(Columns, SPARSITY, PLAIN),
).flatmap(lambda pattern: STORED.map(lambda stored: _with(pattern, stored)))


def _with(pattern: Pattern, stored: dict[str, Any]) -> Pattern:  # Any: fields of any type
    return pattern if isinstance(pattern, Block) else replace(pattern, **stored)


SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)
FACTORS = st.floats(0, 1e300) | st.integers(0, 10**6)
TILE = st.sampled_from(TILES)
GOALS = st.one_of(
    st.fixed_dictionaries({"sparsity": SHARES}),
    st.fixed_dictionaries({"error": SHARES}),
    st.fixed_dictionaries({"scale_factor": FACTORS | st.tuples(FACTORS, FACTORS)}),
)
SKIPS = st.builds(
    lambda goal, **others: SkipSoftmax(**goal, **others),
    GOALS,
    per=st.sampled_from(PER),
    order=st.sampled_from(ORDERS),
    tile=st.none() | st.tuples(TILE, TILE),
    within=SHARES,
)
WHOLE = st.integers(1, 2**63 - 1)
THETAS = st.builds(
    Theta,
    WHOLE,
    st.sampled_from(PLACEMENTS),
    st.sampled_from(DENOMINATORS),
    st.booleans(),
    WHOLE,
    st.integers(0, 99),
    st.floats(-9, 9),
)
METHODS = SKIPS | THETAS
ATTENTION = (
    st.none() | METHODS | st.dictionaries(st.text(max_size=9), st.none() | METHODS, max_size=4)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=st.dictionaries(st.text(max_size=12), st.none() | PATTERNS, max_size=5))
def test_weights_round_trip(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Pattern | None]
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    Recipe(weights).to_toml(path)
    assert list(Recipe.from_toml(path).weights.items()) == list(weights.items())


def test_criteria_as_a_person_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        [[weights]]
        match = "a"
        pattern = "rows"
        sparsity = 0.25
        criterion = "sparsegpt"
        [[weights]]
        match = "b"
        pattern = "nm"
        n = 2
        m = 4
        criterion = { method = "dsnot", start = { method = "sparsegpt", damp = 0.1 } }
        """
    )
    assert Recipe.from_toml(path).weights == {
        "a": Rows(0.25, SparseGPT()),
        "b": NM(2, 4, DSnoT(SparseGPT(damp=0.1))),
    }


ENTRY = '[[weights]]\nmatch = "*"\npattern = '
TWO_FOUR = ENTRY + '"nm"\nn = 2\nm = 4\ncriterion = '


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weights = [", "not TOML"),
        ("a = " + "9" * 5000, "not TOML"),
        ("a = " + "[" * 20000, "not TOML"),
        ("speed = 1", "unknown section 'speed'"),
        ("weights = 3", "array of tables"),
        ("weights = [3]", "needs match"),
        ("[[weights]]\npattern = 'nm'", "needs match"),
        (ENTRY + '"cube"', "'cube' is not one of"),
        (ENTRY + "[]", "is not one of"),
        (ENTRY + '"nm"\nn = 2', "takes the numbers n, m"),
        (ENTRY + '"nm"\nn = 2.5\nm = 4', "takes the numbers n, m"),
        (ENTRY + '"nm"\nn = 2\nm = inf', "takes the numbers n, m"),
        (ENTRY + '"nm"\nn = true\nm = 4', "takes the numbers n, m"),
        (ENTRY + '"nm"\nn = 2\nm = 4\nk = 1', "takes the numbers n, m"),
        (ENTRY + '"unstructured"\nsparsity = "half"', "takes the numbers sparsity"),
        (ENTRY + '"nm"\nn = 2\nm = 4\nvalues = 4', "takes values as text and group as a whole"),
        (ENTRY + '"nm"\nn = 2\nm = 4\nvalues = "int4"\ngroup = 1.5', "takes values as text"),
        (ENTRY + '"nm"\nn = 2\nm = 4\ncriterion = "luck"', "criterion 'luck'"),
        (TWO_FOUR + '"sparsegpt"\nblock = 4', "takes the numbers n, m"),
        (TWO_FOUR + "3", "criterion 3: it is not one of magnitude, random, wanda"),
        (TWO_FOUR + "{ damp = 0.1 }", "criterion None"),
        (TWO_FOUR + '{ method = "wanda", damp = 0.1 }', "'damp' is not an option; there are: none"),
        (TWO_FOUR + '{ method = "sparsegpt", damp = "big" }', "damp='big' must be a number"),
        (TWO_FOUR + '{ method = "sparsegpt", damp = nan }', "damp=nan must be a number"),
        (TWO_FOUR + '{ method = "sparsegpt", block = 1.5 }', "block=1.5 must be a whole number"),
        (
            TWO_FOUR + '{ method = "random", seed = 9223372036854775808 }',
            "seed=9223372036854775808",
        ),
        (TWO_FOUR + '{ method = "dsnot", start = "luck" }', "criterion 'luck'"),
        (TWO_FOUR + '{ method = "dsnot", start = "dsnot" }', "start must be"),
        (ENTRY + '"rows"\nrows = 3', "takes the numbers sparsity"),
        (ENTRY + '"dense"\n' + ENTRY + '"dense"', "same match"),
    ],
)
def test_unreadable_weights_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InvalidRecipe, match="Recipe.to_toml shows the form") as caught:
        Recipe.from_toml(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_binary_files_and_senseless_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecipe):
        Recipe.from_toml(path)
    path.write_text(ENTRY + '"nm"\nn = 5\nm = 4')
    with pytest.raises(InvalidPattern):
        Recipe.from_toml(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(attention=ATTENTION)
def test_attention_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    attention: AttentionPattern | dict[str, AttentionPattern | None] | None,
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    recipe = Recipe({"*.mlp.*": NM(2, 4)}, attention)
    recipe.to_toml(path)
    read = Recipe.from_toml(path)
    assert read == recipe
    if isinstance(attention, dict):
        assert isinstance(read.attention, dict)
        assert list(read.attention) == list(attention), "the first match wins: order counts"


def test_attention_as_a_person_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        [[attention]]
        match = "*.layers.0.*"
        method = "dense"
        [[attention]]
        match = "*.layers.1.*"
        method = "theta"
        k = 64
        [[attention]]
        match = "*"
        method = "skip_softmax"
        scale_factor = [400, 8.5]
        per = "model"
        tile = [128, 64]
        """
    )
    recipe = Recipe.from_toml(path)
    assert recipe.attention_for("model.layers.0.self_attn") is None
    assert recipe.attention_for("model.layers.1.self_attn") == Theta(64)
    expected = SkipSoftmax(scale_factor=(400, 8.5), per="model", tile=(128, 64))
    assert recipe.attention_for("model.layers.2.self_attn") == expected
    path.write_text('[attention]\nmethod = "skip_softmax"\nsparsity = 0.7')
    assert Recipe.from_toml(path) == Recipe(attention=SkipSoftmax(sparsity=0.7))


def test_a_metric_is_not_written(tmp_path: Path) -> None:
    skip = SkipSoftmax(sparsity=0.5, metric=lambda model: 0.0, within=0.05)
    for attention in (skip, {"*": skip}):
        with pytest.raises(InvalidRecipe, match="its metric is a function"):
            Recipe(attention=attention).to_toml(tmp_path / "recipe.toml")
    assert list(tmp_path.iterdir()) == []
    Recipe(attention=replace(skip, metric=None)).to_toml(tmp_path / "recipe.toml")


SKIP = '[[attention]]\nmatch = "*"\nmethod = "skip_softmax"\n'
THETA = '[[attention]]\nmatch = "*"\nmethod = "theta"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attention = 3", "array of tables"),
        ("attention = [3]", "needs match"),
        ("[[attention]]\nmethod = 'dense'", "needs match"),
        ("[[attention]]\nmatch = 3\nmethod = 'dense'", "needs match"),
        (SKIP + "sparsity = 0.5\n" + THETA + "k = 4", "the same match '*'"),
        ("[attention]\nsparsity = 0.5", "method None is not one of skip_softmax, theta, dense"),
        ("[attention]\nmatch = '*'\nmethod = 'dense'", "'match' is not a key of dense"),
        ("[[attention]]\nmatch = '*'\nmethod = 'blasst'", "method 'blasst' is not one of"),
        ("[[attention]]\nmatch = '*'\nmethod = []", "method [] is not one of"),
        (SKIP + "sparsty = 0.5", "'sparsty' is not a key of skip_softmax; there are: sparsity"),
        (SKIP + "sparsity = 0.5\nmetric = 'ppl'", "'metric' is not a key"),
        (SKIP + "sparsity = 0.5\nk = 3", "'k' is not a key of skip_softmax"),
        (SKIP, "exactly one of sparsity, error and scale_factor"),
        (SKIP + "sparsity = 0.5\nerror = 0.1", "exactly one of"),
        (SKIP + "sparsity = '0.5'", "sparsity = '0.5' must be a number"),
        (SKIP + "sparsity = true", "sparsity = True must be a number"),
        (SKIP + "sparsity = nan", "sparsity = nan must be a number"),
        (SKIP + "sparsity = 70", "sparsity=70 must lie in (0, 1)"),
        (SKIP + "error = inf", "error = inf must be a number"),
        (SKIP + "error = 0.0", "error=0.0 must lie in (0, 1)"),
        (SKIP + "scale_factor = [1, 2, 3]", "scale_factor = [1, 2, 3] must be a number, or"),
        (SKIP + "scale_factor = [1, nan]", "scale_factor = [1, nan] must be"),
        (SKIP + "scale_factor = 1" + "0" * 400, "must be a number"),
        (SKIP + "scale_factor = -1", "a scale factor is a finite number from 0 on"),
        (SKIP + "sparsity = 0.5\ntile = [64, 64, 64]", "tile = [64, 64, 64] must be"),
        (SKIP + "sparsity = 0.5\ntile = 64", "tile = 64 must be"),
        (SKIP + "sparsity = 0.5\ntile = [64.0, 64]", "tile = [64.0, 64] must be"),
        (SKIP + "sparsity = 0.5\ntile = [true, 64]", "tile = [True, 64] must be"),
        (SKIP + "sparsity = 0.5\ntile = [63, 64]", "tile=(63, 64) must be two of"),
        (SKIP + "sparsity = 0.5\nper = 'layer'", "per='layer' is not one of head, model"),
        (SKIP + "sparsity = 0.5\nper = 3", "per = 3 must be text"),
        (SKIP + "sparsity = 0.5\norder = 'random'", "order='random' is not one of"),
        (SKIP + "sparsity = 0.5\nwithin = 1.0", "within=1.0 must lie in (0, 1)"),
        (THETA, "k is missing"),
        (THETA + "k = 0", "k=0 must be a whole number from 1 on"),
        (THETA + "k = 64.0", "k = 64.0 must be a whole number"),
        (THETA + "k = true", "k = True must be a whole number"),
        (THETA + "k = 9223372036854775808", "must be a whole number"),
        (THETA + "k = 64\nv_mean = 1", "v_mean = 1 must be true or false"),
        (THETA + "k = 64\ndense_layers = true", "dense_layers = True must be a whole number"),
        (THETA + "k = 64\ndense_layers = -1", "dense_layers=-1 must be"),
        (THETA + "k = 64\ndeviations = nan", "deviations = nan must be a number"),
        (THETA + "k = 64\nplacement = 'before'", "placement='before' is not one of pre, post"),
        (THETA + "k = 64\ndenominator = 'none '", "denominator='none ' is not one of exact"),
        (THETA + "k = 64\ntile = [64, 64]", "'tile' is not a key of theta"),
    ],
)
def test_unreadable_attention_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InvalidRecipe) as caught:
        Recipe.from_toml(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
