"""What calibration decided for one attention: SkipThresholds, ThetaThresholds; plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SkipThresholds:
    """Thresholds of a skip-softmax attention.

    prefill, decode: scale factor of each query head; lambda = factor / keys. tile: (query rows,
    keys). order: as in `SkipSoftmax`. keys: fewest and most keys of a row in the calibration,
    (0, 0) if there was none. skipped: share of visible tiles that the calibration data skipped in
    prefill and in decode; error: relative output error of the layer in either; lost_mass: largest
    mean softmax mass that a head lost in either. None where it was not measured. r2: how well
    a * exp(b * sparsity) fits factor over sparsity (1 is perfect), in either phase.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    tile: tuple[int, int]
    order: str
    keys: tuple[int, int] = (0, 0)
    skipped: tuple[float | None, float | None] = (None, None)
    error: tuple[float | None, float | None] = (None, None)
    lost_mass: tuple[float | None, float | None] = (None, None)
    r2: tuple[float | None, float | None] = (None, None)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.prefill)


@dataclass(frozen=True)
class ThetaThresholds:
    """Thresholds of a Top-Theta attention.

    theta[h][i]: threshold of query head h for a row with lengths[i] visible keys, interpolated
    linearly between lengths and constant beyond them. lost[h][i]: calibrated sum of e^(x - max)
    over dropped elements, empty unless the denominator is "offline". keys: fewest and most keys of
    a calibrated row. kept: mean share of elements kept in rows longer than k; error: relative
    output error of the layer; None where not measured.
    """

    k: int
    lengths: tuple[int, ...]
    theta: tuple[tuple[float, ...], ...]
    lost: tuple[tuple[float, ...], ...]
    placement: str
    denominator: str
    v_mean: bool
    keys: tuple[int, int] = (0, 0)
    kept: float | None = None
    error: float | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.theta)


AttentionThresholds = SkipThresholds | ThetaThresholds
