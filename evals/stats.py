"""Statistics of samples. What was not scored is None, and never counts as zero."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def scored(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Return the values that are there, as an array; NaN counts as not scored. Infinity stays: it is a result."""
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return array[~np.isnan(array)]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the scored values; None where there is none."""
    array = scored(values)
    return float(array.mean()) if len(array) else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the scored values; None where there is none."""
    array = scored(values)
    return float(np.median(array)) if len(array) else None


def standard_error(values: Sequence[float | None], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Return the standard error of the mean; None with fewer than two independent values.

    Args:
        values: scores; None and NaN are left out.
        clusters: for each value, what it has in common with others: samples of one trace are not independent. The
            error is then robust to any correlation inside of a cluster (Miller, "Adding Error Bars to Evals", arXiv
            2411.00640, section 2.2). None: every value is its own cluster.

    Raises:
        ValueError: there is not one cluster per value.
    """
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"expected one cluster per value, got {len(clusters)} for {len(values)} values")
    array = scored(values)
    if not len(array) or not np.isfinite(array).all():
        return None
    deviations = array - array.mean()
    if clusters is None:
        sums = deviations
    else:
        kept = [c for c, v in zip(clusters, values, strict=True) if v is not None and not np.isnan(v)]
        totals: dict[Hashable, float] = {}
        for cluster, deviation in zip(kept, deviations, strict=True):
            totals[cluster] = totals.get(cluster, 0.0) + float(deviation)
        sums = np.array(list(totals.values()))
    if len(sums) < 2:
        return None
    # len(sums) / (len(sums) - 1): the mean is estimated from the same values.
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(array))


def with_errors(
    columns: Mapping[str, Sequence[float | None]], clusters: Sequence[Hashable] | None = None
) -> dict[str, float | None]:
    """Return the mean of every column under its name, and the standard error under `NAME_se`."""
    found: dict[str, float | None] = {}
    for name, values in columns.items():
        found |= {name: mean(values), f"{name}_se": standard_error(values, clusters)}
    return found


def paired_interval(
    differences: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Return a bootstrap interval of 95 % for the mean of paired differences; None with fewer than two clusters.

    Whole clusters are drawn again: samples of one trace are not independent.

    Args:
        differences: of two arms on the same sample.
        clusters: for each, what it has in common with others.
        resamples: how often to draw.
        seed: of the draws.
    """
    sums: dict[Hashable, list[float]] = {}
    for cluster, difference in zip(clusters, differences, strict=True):
        part = sums.setdefault(cluster, [0.0, 0.0])
        part[0] += difference
        part[1] += 1
    if len(sums) < 2:
        return None
    totals = np.array(list(sums.values()))
    drawn = totals[np.random.default_rng(seed).integers(0, len(totals), (resamples, len(totals)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]).tolist()
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median of repeated timings and how far they lie apart; the unit is that of the values."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    minimum: float
    maximum: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Summarise timings; None where there is none."""
    array = scored(values)
    if not len(array):
        return None
    minimum, low, middle, high, maximum = np.quantile(array, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Spread(median=middle, low=low, high=high, minimum=minimum, maximum=maximum, n=len(array))
