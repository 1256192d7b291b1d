"""What calibration has seen of a model's attentions: statistics by name, from any graph of it."""

from typing import TypedDict

from torch import Tensor

from sparsefx.attention.sites import AttentionSite
from sparsefx.attention.spec import SkipSoftmax, Theta
from sparsefx.calibrate.attention.observe import Observer
from sparsefx.calibrate.attention.skips import SkipStatistics
from sparsefx.calibrate.attention.state import Saved
from sparsefx.calibrate.attention.thetas import BAND, ThetaStatistics, of_layer
from sparsefx.calibrate.attention.tiles import Call
from sparsefx.errors import NonFiniteAttention
from sparsefx.spec import Recipe

Statistics = SkipStatistics | ThetaStatistics


class Header(TypedDict):
    """names: all attentions in order of appearance; sites: (name, heads, KV heads) of the sparse
    ones; keys: fewest and most keys of a call, by name."""

    names: list[str]
    sites: list[tuple[str, int, int]]
    keys: dict[str, tuple[int, int]]


class Survey:
    """The attentions of a model under a recipe, and their statistics.

    names: all attentions, in order of appearance; sites: the statistics of those that are to be
    sparse; batch: the number of the one at work, for errors; measuring: whether thresholds are
    applied and measured instead of calibrated (Theta only).
    """

    def __init__(self, recipe: Recipe, tile: tuple[int, int]) -> None:
        self.names: list[str] = []
        self.sites: dict[str, Statistics] = {}
        self.batch = 0
        self.measuring = False
        self._recipe = recipe
        self._tile = tile
        self._heads: dict[str, tuple[int, int]] = {}

    def watch(self, site: AttentionSite) -> Observer | None:
        """The observer of an attention, None where the recipe leaves it dense."""
        if site.name not in self.names:
            self.names.append(site.name)
        if self._recipe.attention_for(site.name) is None:
            return None
        if site.name not in self.sites:
            self._add(site.name, site.heads, site.kv_heads)
        tile = self._tile_of(site.name)

        def observe(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dense: Tensor) -> Tensor:
            call = Call(q, k, v, mask, site.is_causal, site.scale, tile)
            return self._observed(site.name, call, dense)

        return observe

    def saved(self) -> Saved:
        """The survey as a state file keeps it."""
        header = Header(
            names=self.names,
            sites=[(name, *heads) for name, heads in self._heads.items()],
            keys={name: each.keys for name, each in self.sites.items()},
        )
        tensors = {
            f"{number}.{key}": tensor
            for number, each in enumerate(self.sites.values())
            for key, tensor in each.tensors().items()
        }
        return Saved(self.batch, header, tensors)

    def restore(self, saved: Saved) -> None:
        """Takes up where `saved` was left."""
        header: Header = saved.header  # type: ignore[assignment]  # its digest says that we wrote it
        self.names, self.batch = list(header["names"]), saved.done
        for number, (name, heads, kv_heads) in enumerate(header["sites"]):
            self._add(name, heads, kv_heads)
            fewest, most = header["keys"][name]
            prefix = f"{number}."
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in saved.tensors.items()
                if key.startswith(prefix)
            }
            self.sites[name].load((fewest, most), own)

    def of(self, spec: SkipSoftmax) -> dict[str, SkipStatistics]:
        """The skip-softmax attentions that `spec` is for."""
        return {
            name: each
            for name, each in self.sites.items()
            if isinstance(each, SkipStatistics) and self._recipe.attention_for(name) == spec
        }

    def thetas(self) -> dict[str, ThetaStatistics]:
        """The Top-Theta attentions."""
        sites = self.sites.items()
        return {name: each for name, each in sites if isinstance(each, ThetaStatistics)}

    def _add(self, name: str, heads: int, kv_heads: int) -> None:
        spec = self._recipe.attention_for(name)
        self._heads[name] = (heads, kv_heads)
        if isinstance(spec, Theta):
            layer = of_layer(spec, self.names.index(name))
            self.sites[name] = ThetaStatistics.empty(layer, heads)
        else:
            assert spec is not None
            self.sites[name] = SkipStatistics.empty(spec, heads, kv_heads, self._tile)

    def _tile_of(self, name: str) -> tuple[int, int]:
        statistics = self.sites[name]
        return statistics.tile if isinstance(statistics, SkipStatistics) else BAND

    def _observed(self, name: str, call: Call, dense: Tensor) -> Tensor:
        statistics = self.sites[name]
        if isinstance(statistics, ThetaStatistics):
            result = statistics.measure(call) if self.measuring else statistics.add(call)
            finite = bool(result.isfinite().all())
        else:
            result = dense
            finite = statistics.add(call)
        if not finite:
            raise NonFiniteAttention(name=name, batch=self.batch)
        return result
