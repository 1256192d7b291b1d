"""One Dynamo graph -> a compiled function: bind, run the passes, hand the rest to Inductor.

Knows no pass and no kernel: what runs is given by a Plan (api/ makes it).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from sparsefx import debug
from sparsefx.graph import Bound, bind, unbind, weight_name
from sparsefx.pipeline import Pass, PassContext, run
from sparsefx.session import GraphRecord, Session, remember_weights
from sparsefx.target import Announce
from sparsefx.variants import Compiled, Variant, Variants
from sparsefx.weights import Version, version

WITH_GRADIENTS = (
    "gradients are on, so weights may change: call under torch.no_grad() to use kernels"
)
MASK_KEPT = "gradients are on: the mask is kept and trainable; torch.no_grad() uses kernels"
RECIPE_UNUSED = (
    "gradients are on, so the recipe is not applied: sparsify the model to train it, or call under "
    "torch.no_grad()"
)
UNMATCHED = "no packing rule matches the way this layer is written"


Emit = Callable[[fx.GraphModule, Sequence[object]], Compiled]


def inductor(settings: Mapping[str, object], announce: Announce) -> Emit:
    """Inductor under the given settings (`torch._inductor.config` names), told by `announce`."""
    patches = dict(settings)

    def emit(gm: fx.GraphModule, inputs: Sequence[object]) -> Compiled:
        # Imported here: it takes seconds, which `import sparsefx` and the shell must not pay.
        from torch._inductor.compile_fx import compile_fx

        announce()
        function = compile_fx(
            gm,
            inputs,  # type: ignore[arg-type]  # tensors and sizes, as Dynamo gave them
            config_patches=patches,
        )
        assert callable(function)  # Inductor gives file names or weights only ahead of time
        return function

    return emit


@dataclass(frozen=True)
class Plan:
    """Which passes run without and with gradients, and who compiles what they leave."""

    inference: tuple[Pass, ...]
    training: tuple[Pass, ...]
    emit: Emit
    has_recipe: bool = False
    """Whether `inference` prunes copies of weights, which training leaves alone."""


class Compiler:
    """A torch.compile backend for one model: `compiler(gm, example_inputs)`.

    Graphs of the model share one WeightMemo; what was done goes to `session`.
    """

    def __init__(self, plan: Plan, session: Session) -> None:
        self.plan = plan
        self.session = session
        self._weights = session.weights()
        self._lock = threading.Lock()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Compiled:
        """Compiles one graph. Never fails where Inductor alone would not."""
        train = _needs_gradients(gm, example_inputs)
        first = (self._train if train else self._specialise)(gm, example_inputs)
        return Variants(first, lambda args: self._respecialise(gm, args))

    def _specialise(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Variant:
        bound = bind(gm, inputs)
        ctx = self._context()
        counts = run(bound.gm, self.plan.inference, ctx)
        skipped = ", ".join(sorted(debug.settings().skip))
        self._record(
            bound, ctx, counts, f"SPARSEFX_SKIP left out {skipped}" if skipped else UNMATCHED
        )
        function = self.plan.emit(unbind(bound), inputs)
        return Variant(function, _bound_inputs(gm, bound, ctx.baked))

    def _respecialise(self, gm: fx.GraphModule, args: Sequence[object]) -> Variant:
        """Once more, outside Dynamo, for other weights: sizes are those of the first capture."""
        self._weights.forget()
        placeholders = gm.graph.find_nodes(op="placeholder")
        fakes = [node.meta["example_value"] for node in placeholders]
        inputs = [
            given if weight_name(node) else fake
            for node, given, fake in zip(placeholders, args, fakes, strict=True)
        ]
        fake_mode = detect_fake_mode(fakes)
        with tracing(TracingContext(fake_mode)), torch.no_grad():
            return self._specialise(gm, inputs)

    def _train(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Variant:
        bound = bind(gm, inputs)
        ctx = self._context()
        counts = run(bound.gm, self.plan.training, ctx)
        if self.plan.has_recipe:
            ctx.rows.update(
                (key, replace(row, reason=RECIPE_UNUSED))
                for key, row in ctx.rows.items()
                if row.op == "linear"
            )
        self._record(
            bound, ctx, counts, MASK_KEPT if counts.get("insert_masks") else WITH_GRADIENTS
        )
        return Variant(self.plan.emit(unbind(bound), inputs), ())

    def _context(self) -> PassContext:
        return PassContext(weights=self._weights, graph=len(self.session.graphs))

    def _record(
        self, bound: Bound, ctx: PassContext, counts: dict[str, int], otherwise: str
    ) -> None:
        """Adds the graph to the session; a row that no pass explained gets the `otherwise`."""
        for key, row in ctx.rows.items():
            if not row.kernel and not row.reason:
                ctx.rows[key] = replace(row, reason=otherwise)
        record = GraphRecord(tuple(ctx.rows.values()), dict(ctx.seconds), counts)
        with self._lock:
            self.session.graphs.append(record)
            self.session.names.update(bound.placeholders)
        remember_weights(bound.weights.values(), self.session)


def _needs_gradients(gm: fx.GraphModule, inputs: Sequence[object]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    )


def _bound_inputs(
    gm: fx.GraphModule, bound: Bound, baked: set[str]
) -> tuple[tuple[int, Tensor, Version], ...]:
    positions = {node.name: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return tuple(
        (positions[bound.placeholders[name]], bound.weights[name], version(bound.weights[name]))
        for name in sorted(baked & set(bound.placeholders))
    )
