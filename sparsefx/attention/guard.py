"""Never slower: from how many keys on a sparse attention beats dense, by measurement or roofline.

Both are timed on inputs that skip the calibrated share (probe.py), over a ladder of lengths that
doubles; the crossover is the first length that wins and whose double, if it is on the ladder, wins
too. The lowered node goes dense below it, call by call. docs/guard.md has the rules.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsefx import devices, diskcache, timing
from sparsefx.attention import meaning
from sparsefx.attention.dense import dense_attention
from sparsefx.attention.probe import Probe, probe
from sparsefx.cost import sparse_attention_cost
from sparsefx.guard import MARGIN
from sparsefx.kernel_check import attempt, compare
from sparsefx.target import AttentionLowering, AttentionSpec

SHORTEST = 512
LONGEST = {"prefill": {"cpu": 8192, "cuda": 65536}, "decode": {"cpu": 65536, "cuda": 262144}}
CHECKED = 200  # keys of the comparison with the meaning: several tiles, the last one ragged
_PROTOCOL = "1"  # counts changes in how this module measures; older timings are then not read


@dataclass(frozen=True)
class AttentionVerdict:
    """A kernel against dense attention.

    dense_us, sparse_us: of one group of heads, at `keys` keys; from_keys: fewest keys with which
    the kernel wins, None for never; how: "measured" or "modelled"; fault: why the kernel must not
    be chosen at any speed, or "".
    """

    dense_us: float
    sparse_us: float
    how: str
    keys: int
    from_keys: int | None
    fault: str = ""

    @property
    def wins(self) -> bool:
        """Whether the kernel is to be chosen for some length."""
        return not self.fault and self.from_keys is not None

    @property
    def reason(self) -> str:
        """Why it does not win, "" if it does."""
        if self.wins:
            return ""
        at = f"up to {self.keys} keys ({self.how})"
        return self.fault or f"the sparse attention is not faster than dense {at}"


@dataclass(frozen=True)
class _Step:
    """One length of the ladder: times in microseconds, and a bound of sparse / dense."""

    keys: int
    dense_us: float
    sparse_us: float
    bound: float


_Measure = Callable[[int], _Step]


def measure(
    spec: AttentionSpec, lowering: AttentionLowering, *, device: torch.device, cache: Path
) -> AttentionVerdict:
    """Times `lowering` against dense attention on `device`; a few seconds, once for a `cache`.

    `spec.sparsity` must be known; it is rounded down to a tenth, so that layers share answers.
    Raises KernelRunFailed.
    """
    assert spec.sparsity is not None
    spec = replace(spec, sparsity=math.floor(spec.sparsity * 10 + 1e-6) / 10)
    key = _key(spec, lowering, device)
    found = _recalled(cache, key)
    if found is None:
        fault = _fault(spec, lowering, device)
        steps = () if fault else _climb(spec, lambda keys: _time(spec, lowering, keys, device))
        found = _verdict(tuple(steps), "measured", fault)
        diskcache.remember(cache / "timings", key, asdict(found))
    return found


def model(spec: AttentionSpec, device_name: str, *, cache: Path | None = None) -> AttentionVerdict:
    """Predicts the crossover by the roofline of a device that need not be present.

    The kernel is taken to reach the roofline: the answer is what skipping can gain at best.
    """
    device = devices.named(device_name, cache)

    def step(keys: int) -> _Step:
        queries = 1 if spec.phase == "decode" else keys
        sizes = (spec.batch, spec.heads, spec.kv_heads, queries, keys, spec.head_dim, spec.dtype)
        dense, sparse = (
            sparse_attention_cost(*sizes, skipped).seconds(device) * 1e6
            for skipped in (0.0, spec.sparsity or 0.0)
        )
        return _Step(keys, dense, sparse, sparse / dense)

    return _verdict(tuple(_climb(spec, step)), "modelled", "")


def lengths(spec: AttentionSpec) -> tuple[int, ...]:
    """The ladder of key counts for `spec`: its own where no call brings another."""
    if not spec.vary:
        return (spec.keys,)
    # Any GPU is "cuda" here; a roofline's ladder may well be longer than this machine could time.
    longest = LONGEST[spec.phase]["cuda" if torch.cuda.is_available() else "cpu"]
    count = int(math.log2(max(longest, SHORTEST) // SHORTEST)) + 1
    return tuple(SHORTEST << step for step in range(count))


def _climb(spec: AttentionSpec, step: _Measure) -> Iterator[_Step]:
    """Steps of the ladder, up to the second win in a row."""
    wins = 0
    for keys in lengths(spec):
        taken = step(keys)
        yield taken
        wins = wins + 1 if taken.bound < MARGIN else 0
        if wins == 2:
            return


def _verdict(steps: tuple[_Step, ...], how: str, fault: str) -> AttentionVerdict:
    if not steps:
        return AttentionVerdict(0.0, 0.0, how, 0, None, fault)
    last = steps[-1]
    run = 0
    while run < len(steps) and steps[-1 - run].bound < MARGIN:
        run += 1
    from_keys = steps[-run].keys if run else None
    return AttentionVerdict(last.dense_us, last.sparse_us, how, last.keys, from_keys, fault)


def _time(
    spec: AttentionSpec, lowering: AttentionLowering, keys: int, device: torch.device
) -> _Step:
    case = probe(spec, keys, spec.sparsity or 0.0, device)

    def dense(copy: timing.Copy) -> Tensor:
        q, k, v = copy
        return dense_attention(q, k, v, case.mask, *case.seen)

    def sparse(copy: timing.Copy) -> Tensor:
        return _run(lowering, replace(case, q=copy[0], k=copy[1], v=copy[2]))

    with torch.no_grad():
        took = timing.paired(dense, sparse, (case.q, case.k, case.v), device)
    return _Step(keys, took.first_us, took.second_us, took.bound)


def _run(lowering: AttentionLowering, case: Probe) -> Tensor:
    result: Tensor = lowering.op(*case.arguments, 0, 0, lowering.handle)
    return result


@torch.no_grad()
def _fault(spec: AttentionSpec, lowering: AttentionLowering, device: torch.device) -> str:
    """What is wrong with the kernel's numbers on a small input, or ""."""
    case = probe(spec, CHECKED, spec.sparsity or 0.0, device)
    expected = getattr(meaning, f"{spec.method}_attention")(*case.arguments)
    return compare(attempt(lowering.handle, lambda: _run(lowering, case)), expected, spec.dtype)[1]


def _key(spec: AttentionSpec, lowering: AttentionLowering, device: torch.device) -> dict[str, str]:
    """All that a timing depends on; the heads beyond one group and the batch do not."""
    group = spec.heads // spec.kv_heads
    alike = replace(spec, heads=group, kv_heads=1, batch=1, queries=0, keys=0)
    return {
        "spec": repr(alike),
        "lengths": json.dumps(lengths(spec)),
        "op": str(lowering.op),
        "kernel": lowering.text,
        **devices.surroundings(device),
        "protocol": f"attention {_PROTOCOL}",
    }


def _recalled(cache: Path, key: dict[str, str]) -> AttentionVerdict | None:
    found = diskcache.recall(cache / "timings", key)
    if found is None:
        return None
    dense, sparse = (diskcache.number(found.get(name)) for name in ("dense_us", "sparse_us"))
    keys, from_keys, fault = found.get("keys"), found.get("from_keys"), found.get("fault")
    if dense is None or sparse is None or not isinstance(keys, int) or not isinstance(fault, str):
        return None
    if from_keys is not None and not isinstance(from_keys, int):
        return None
    return AttentionVerdict(dense, sparse, "measured", keys, from_keys, fault)
