"""How strongly a model's loss depends on the outputs of its layers: mean squared gradients.

    g = d loss / d output        E[g^2] over tokens, of each output of a layer

To second order, with the Fisher matrix for the Hessian, and outputs and tokens taken as
independent, an error d of the outputs raises the loss by 1/2 sum E[g^2] d^2. Kim et al. 2025
(GuidedQuant, arXiv 2505.07004) weigh the errors of quantised layers by the same gradients.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, fx, nn

from sparsefx.calibrate import together
from sparsefx.calibrate.given import Given, arguments_of, captured, tensors_in
from sparsefx.calibrate.inputs import Use, layer_uses
from sparsefx.calibrate.plan import tokens_of
from sparsefx.calibrate.rows import PatchRows, Tokens
from sparsefx.calibrate.statistics import SquareSum
from sparsefx.entry import inferring
from sparsefx.errors import EmptyCalibration, NoGradient, NonFiniteStatistics
from sparsefx.graph import clone_inputs
from sparsefx.prune.language_loss import by_name, loss_of
from sparsefx.prune.weights import PrunableWeight

_NAMED = 5  # layers that a warning names
BATCHES = 8  # means over thousands of tokens: more of them change little


class LossIgnoresLayers(UserWarning):
    """Layers on whose outputs the loss does not depend, or not smoothly."""


def squared_gradients(
    model: nn.Module, batches: Iterable[object], weights: Mapping[str, PrunableWeight]
) -> dict[str, Tensor]:
    """Mean squared gradient of the loss at each output of each layer, float64 by name: [out], of
    experts [experts * out], each one's mean over its own rows.

    The loss is the sum over predicted tokens of a language model, or the output's own `loss`
    (`loss_of`); of any other model a sum of its outputs under random signs, whose squared gradient
    is expected to be that of every output. Of the first 8 batches, in eval mode; gradients of
    activations only, so memory is the activations of one batch. Padding does not count. The model
    is not changed. In distributed runs the means are over all processes.

    Warns of layers with no gradient (LossIgnoresLayers). Raises EmptyCalibration, NotCapturable,
    NoGradient, NonFiniteStatistics.
    """
    # Tensors made in inference mode could not be written to behind it, nor differentiated.
    with torch.inference_mode(False), inferring(model):
        with together.all_or_none("finding its gradients"):
            found = _summed(model, batches, weights)
        sums = (part for parts in found.values() for part in parts)
        together.add_up(tensor for each in sums for tensor in each.tensors.values())
        means = {name: _mean(name, each) for name, each in found.items()}
    _warn_of_flat([name for name, mean in means.items() if not mean.any()])
    return means


def _summed(
    model: nn.Module, batches: Iterable[object], weights: Mapping[str, PrunableWeight]
) -> dict[str, list[SquareSum]]:
    """Squares over the first batches, of each weight for each of its parts."""
    names = {alias: name for name, each in weights.items() for alias in each.names}
    found = {
        name: [SquareSum(each.fit_shape[0], each.parameter.device) for _ in range(each.parts)]
        for name, each in weights.items()
    }
    graphs: dict[str, tuple[fx.GraphModule, list[Use]]] = {}
    number = -1
    for number, batch in enumerate(islice(batches, BATCHES)):
        given = arguments_of(by_name(model, batch))
        if given.signature not in graphs:
            gm = captured(model, given, number, _loss_or_outputs)
            graphs[given.signature] = gm, layer_uses(gm, names)
        _add(*graphs[given.signature], given, found, number)
    if number < 0:
        raise EmptyCalibration
    return found


def _warn_of_flat(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"the loss has no gradient at the outputs of {', '.join(names[:_NAMED])}{more}: a "
            "knapsack takes it that they may be pruned at no cost; exclude them, or pass "
            'Knapsack(objective="error")',
            LossIgnoresLayers,
            stacklevel=2,
        )


def _loss_or_outputs(output: object, inputs: Mapping[str, object]) -> object:
    loss = loss_of(output, inputs, "sum")
    if loss is not None:
        return loss
    if isinstance(output, Mapping):  # a cache is no result
        return {key: value for key, value in output.items() if key != "past_key_values"}
    return output


def _add(
    gm: fx.GraphModule,
    uses: list[Use],
    given: Given,
    found: Mapping[str, Sequence[SquareSum]],
    number: int,
) -> None:
    watched = _Watched(gm, uses, tokens_of(gm, given.leaves), found)
    with torch.enable_grad():
        results = tensors_in(watched.run(*clone_inputs(given.leaves)))
        outputs = [each for each in results if each.requires_grad]
        random = torch.Generator().manual_seed(number)
        signs = [
            torch.ones_like(each) if each.dim() == 0 else _signs(each, random) for each in outputs
        ]
        if not outputs:
            raise NoGradient(rule="no output of the model depends on them smoothly")
        try:
            torch.autograd.backward(outputs, signs, inputs=watched.leaves)
        except RuntimeError as error:  # of an operator that cannot be differentiated
            raise NoGradient(rule=(str(error).strip() or repr(error)).splitlines()[0]) from error


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=random) * 2 - 1
    return signs.to(like.device, like.dtype)


class _Watched(fx.Interpreter):
    """Runs a graph with weights that need no gradients; adds those of the layers' outputs."""

    def __init__(
        self,
        gm: fx.GraphModule,
        uses: list[Use],
        tokens: Tokens,
        found: Mapping[str, Sequence[SquareSum]],
    ) -> None:
        super().__init__(gm)
        self._uses = {use.node: use for use in uses}
        self._tokens, self._found = tokens, found
        self._routing = {node for use in uses for node in use.sources[1:]}
        self._routes: dict[fx.Node, Tensor] = {}
        self.leaves: list[Tensor] = []
        """The outputs at which gradients begin: nothing before them depends on a layer."""

    def get_attr(self, target: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:  # type: ignore[override]
        """As the base class does, but that weights need no gradients."""
        value = super().get_attr(target, args, kwargs)  # type: ignore[arg-type]
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> object:
        """As the base class does; a layer's output is watched."""
        value = super().run_node(n)
        if n in self._routing and isinstance(value, Tensor):
            self._routes[n] = value
        if n not in self._uses:
            return value
        assert isinstance(value, Tensor)
        if not value.requires_grad:
            self.leaves.append(value.detach().requires_grad_())
            value = self.leaves[-1].clone()  # a leaf may not be written to, as relu_ does
        use = self._uses[n]
        value.register_hook(lambda gradient: self._take(use, gradient))
        return value

    def _take(self, use: Use, gradient: Tensor) -> None:
        found = self._found[use.parameter]
        if isinstance(use.rows, PatchRows):
            pixels = gradient.movedim(-3, -1).flatten(0, -2)
            for own, rows in zip(found, pixels.chunk(len(found), 1), strict=True):
                own.add(rows, self._tokens.samples)
            return
        routes = (self._routes[node] for node in use.sources[1:])
        for part, rows, samples in use.rows(self._tokens, gradient, *routes):
            found[part].add(rows, samples)


def _mean(name: str, parts: Sequence[SquareSum]) -> Tensor:
    # Without rows: the loss ignores it, or no token went to the expert.
    mean = torch.cat([each.squares / each.count[0].clamp(min=1) for each in parts])
    if not mean.isfinite().all():
        raise NonFiniteStatistics(statistic="gradients", name=name)
    return mean
