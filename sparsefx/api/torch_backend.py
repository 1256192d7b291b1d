"""The torch.compile backend "sparsefx"."""

from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from sparsefx.api.plans import Request, make_plan, tuned_results
from sparsefx.api.sparse_model import check_data
from sparsefx.api.target_table import check_guard, choose_target, device_of
from sparsefx.attention.spec import default_tile
from sparsefx.attention.thresholds import AttentionThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.compiler import Compiler
from sparsefx.errors import UnknownOption
from sparsefx.session import Session, continued
from sparsefx.spec import Pattern, Recipe
from sparsefx.variants import Compiled


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Compiled:
    """The torch.compile backend "sparsefx".

    options: "recipe" (a Recipe), "thresholds" (what `sparsefx.annotations.attention_thresholds`
    reads from a model that `sparsify` calibrated: a backend is given no data), "annotations" (what
    `sparsefx.annotations.annotations` reads: "int8_dynamic" is not in the weights themselves),
    "guard", "target" as in `compile`, "memory": "fast" alone, since a backend runs the model that
    it is given (`compile` has "small"), "tuned" as there, and "inductor", a dict of settings.
    `explain(compiled_model)` works on the result of torch.compile. Raises UnknownOption,
    UnknownTarget, TargetUnavailable, MissingCalibration (torch wraps them in
    BackendCompilerFailed).
    """
    given = dict(options or {})
    recipe, guard = given.pop("recipe", None), given.pop("guard", "measure")
    target, settings = given.pop("target", None), given.pop("inductor", None)
    thresholds, decided = given.pop("thresholds", None), given.pop("annotations", None)
    memory, tuned = given.pop("memory", "fast"), given.pop("tuned", None)
    if given:
        known = "recipe, thresholds, annotations, guard, target, memory, tuned, inductor"
        raise UnknownOption(option="options", value=sorted(given)[0], known=known)
    if memory != "fast":
        known = '"fast"; a backend runs the model that it is given: "small" is for sparsefx.compile'
        raise UnknownOption(option="memory", value=memory, known=known)
    chosen = choose_target(target, device_of(example_inputs))
    check_guard(guard, chosen)
    asked = (
        f"{chosen.name} {guard} {mode} {recipe!r} {settings!r} {thresholds!r} {decided!r} {tuned}"
    )
    if not isinstance(recipe, Recipe | None):
        raise UnknownOption(option="recipe", value=recipe, known="a sparsefx.Recipe")
    wanted = Wanted(_thresholds(thresholds), recipe, default_tile(chosen.device))
    if recipe is not None and not wanted.thresholds:
        check_data(recipe, None)
    session = continued(example_inputs, asked) or Session(
        "torch.compile", chosen.name, str(guard), asked, tuned=tuned_results(tuned)
    )
    inductor = _mapping("inductor", settings)
    request = Request(chosen, str(guard), mode, inductor, session.tuned)
    plan = make_plan(request, wanted, recipe, _patterns(decided))
    if recipe is not None:
        session.globs = tuple(recipe.weights)
    return Compiler(plan, session)(gm, example_inputs)


def _mapping(option: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnknownOption(option=option, value=value, known="a dict")
    return value


def _thresholds(value: object) -> dict[str, AttentionThresholds]:
    found = _mapping("thresholds", value)
    strange = [each for each in found.values() if not isinstance(each, AttentionThresholds)]
    if strange:
        known = "what attention_thresholds(model) returns"
        raise UnknownOption(option="thresholds", value=strange[0], known=known)
    return {name: each for name, each in found.items() if isinstance(each, AttentionThresholds)}


def _patterns(value: object) -> dict[str, Pattern]:
    found = _mapping("annotations", value)
    strange = [each for each in found.values() if not isinstance(each, Pattern)]
    if strange:
        known = "what annotations(model) returns"
        raise UnknownOption(option="annotations", value=strange[0], known=known)
    return {name: each for name, each in found.items() if isinstance(each, Pattern)}
