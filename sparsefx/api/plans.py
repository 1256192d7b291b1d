"""What was asked for -> a Plan: the passes to run and who judges their kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsefx import conv_guard, debug, quantised_dense, timing
from sparsefx import guard as guards
from sparsefx.attention import guard as attention_guards
from sparsefx.attention.wanted import Wanted
from sparsefx.attributes import count_nonfinite
from sparsefx.by_rows import NO_COSTS, Costs, dispatch_us
from sparsefx.compiler import Plan, inductor
from sparsefx.convolutions import ConvLowering, ConvSpec, Taps
from sparsefx.devices import nearest
from sparsefx.errors import NonFiniteWeight, UnknownOption
from sparsefx.passes import pipelines
from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.passes.lower import Baseline, Judge, no_baseline
from sparsefx.passes.lower_attention import AttentionJudge
from sparsefx.passes.lower_conv import ConvJudge
from sparsefx.prune.weights import prunable_weights
from sparsefx.spec import Pattern, Recipe
from sparsefx.target import (
    AttentionLowering,
    AttentionSpec,
    Inspect,
    LinearSpec,
    Lowering,
    Target,
    no_objections,
)
from sparsefx.tuned import Tuned


@dataclass(frozen=True)
class Request:
    """How to compile: target, guard, torch.compile's mode, Inductor settings, verdicts at hand."""

    target: Target
    guard: str
    mode: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    tuned: Tuned | None = None


def make_plan(
    request: Request,
    wanted: Wanted,
    recipe: Recipe | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    trained: frozenset[str] = frozenset(),
) -> Plan:
    """The plan of a compilation.

    wanted: which attentions are to be sparse; recipe: weights to prune on the way; patterns: what
    was decided for weights before, by parameter name; trained: names of parameters whose masks stay
    with gradients on. Raises UnknownOption, InvalidSetting.
    """
    pipelines.check_skipped()
    judges = pipelines.Judges(
        _judge(request),
        _attention_judge(request),
        _conv_judge(request),
        request.guard != "off",
        _costs(request),
        _baseline(request),
        _inspect(request),
    )
    passes = pipelines.inference(request.target, judges, wanted, patterns or {})
    if recipe is not None and recipe.weights:
        passes = (ApplyRecipe(recipe), *passes)
    patches = {**mode_options(request.mode), **request.settings}
    train = pipelines.training(trained, wanted)
    return Plan(
        passes, train, inductor(patches, request.target.announce), has_recipe=recipe is not None
    )


def mode_options(mode: str | None) -> dict[str, object]:
    """Inductor's settings for a mode of torch.compile. Raises UnknownOption."""
    if not mode:
        return {}
    from torch._inductor import list_mode_options  # slow to import, seldom needed

    modes = list_mode_options()
    if mode not in modes:
        raise UnknownOption(option="mode", value=mode, known=", ".join(modes))
    return dict(modes[mode])


def tuned_results(path: object) -> Tuned | None:
    """The tuning results of a file, None for none. Raises UnknownOption, InvalidTuning, OSError."""
    if path is None:
        return None
    if not isinstance(path, str | Path):
        raise UnknownOption(option="tuned", value=path, known="the path of a file")
    return Tuned.read(path)


def check_memory(memory: object) -> None:
    """Raises UnknownOption."""
    if memory not in ("fast", "small"):
        raise UnknownOption(option="memory", value=memory, known='"fast", "small"')


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteWeight: a pattern is read from the zeros, and NaN hides them."""
    for name, weight in prunable_weights(model).items():
        if bad := count_nonfinite(weight.parameter):
            raise NonFiniteWeight(name=name, count=bad)


def _judge(request: Request) -> Judge:
    cache = debug.settings().cache

    def measured(
        spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering
    ) -> guards.Verdict:
        measure = partial(guards.measure, cache=cache, tuned=request.tuned)
        return measure(spec, weight, bias, lowering, device=weight.device)

    def modelled(
        spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering
    ) -> guards.Verdict:
        return guards.model(spec, _roofline(request.target), cache=cache)

    return measured if request.guard == "measure" else modelled


def _attention_judge(request: Request) -> AttentionJudge:
    cache, target = debug.settings().cache, request.target

    def measured(
        spec: AttentionSpec, lowering: AttentionLowering
    ) -> attention_guards.AttentionVerdict:
        device = torch.device(target.device)
        return attention_guards.measure(spec, lowering, device=device, cache=cache)

    def modelled(
        spec: AttentionSpec, lowering: AttentionLowering
    ) -> attention_guards.AttentionVerdict:
        return attention_guards.model(spec, _roofline(target), cache=cache)

    return measured if request.guard == "measure" else modelled


def _conv_judge(request: Request) -> ConvJudge:
    cache, target = debug.settings().cache, request.target

    def measured(
        spec: ConvSpec, weight: Tensor, taps: Taps, bias: Tensor | None, lowering: ConvLowering
    ) -> guards.Verdict:
        measure = partial(conv_guard.measure, cache=cache, tuned=request.tuned)
        return measure(spec, weight, taps, bias, lowering, device=weight.device)

    def modelled(
        spec: ConvSpec, weight: Tensor, taps: Taps, bias: Tensor | None, lowering: ConvLowering
    ) -> guards.Verdict:
        return conv_guard.model(spec, _roofline(target), cache=cache)

    return measured if request.guard == "measure" else modelled


def _costs(request: Request) -> Costs:
    """The model is optimistic: it leaves them out."""
    if request.guard != "measure":
        return NO_COSTS
    return Costs(partial(dispatch_us, request.target.device), timing.least_us)


def _baseline(request: Request) -> Baseline:
    if request.guard != "measure":
        return no_baseline
    return partial(quantised_dense.measure, cache=debug.settings().cache, tuned=request.tuned)


def _inspect(request: Request) -> Inspect:
    """The target's word on kernels that are about to be timed: not on those with a verdict."""
    if request.guard != "measure":
        return no_objections
    target, cache = request.target, debug.settings().cache
    at = partial(guards.is_answered, device=target.device, cache=cache, tuned=request.tuned)

    def inspect(asked: Sequence[tuple[LinearSpec, Lowering]]) -> list[str]:
        unknown = [pair for pair in asked if not at(*pair)]
        said = dict(zip(map(id, unknown), target.inspect(unknown), strict=True))
        return [said.get(id(pair), "") for pair in asked]

    return inspect


def _roofline(target: Target) -> str:
    return target.roofline or nearest(target.device)
