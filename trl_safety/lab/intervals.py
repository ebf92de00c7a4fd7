"""Intervals over pairs, with the fine-tuning seeds nested in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over pairs.

    Attributes:
        mean: the mean over pairs of each pair's mean over seeds.
        low: lower end of the 95 % interval; None with one pair, which says nothing about others.
        high: upper end.
        pairs: number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and it does not contain `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def over_pairs(values: Mapping[int, Sequence[float]], *, seed: int = 0) -> Interval:
    """The hierarchical bootstrap of a mean: pairs are drawn with replacement, then seeds within each drawn pair.

    Args:
        values: pair → one value for each of its seeds.
        seed: of the resampling.

    Returns:
        The mean with its percentile interval.
    """
    pairs = [np.asarray(found, dtype=float) for found in values.values()]
    mean = float(np.mean([found.mean() for found in pairs]))
    if len(pairs) < 2:
        return Interval(mean, None, None, len(pairs))
    rng = np.random.default_rng(seed)
    # Seeds are drawn once for each time that a pair could be drawn: a pair that is drawn twice has its seeds drawn twice.
    drawn = rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    means = np.stack([found[rng.integers(len(found), size=(RESAMPLES, len(pairs), len(found)))].mean(2) for found in pairs], axis=2)
    resampled = np.take_along_axis(means, drawn[:, :, None], axis=2)[:, :, 0].mean(1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), len(pairs))


def difference(one: Mapping[tuple[int, int], float], other: Mapping[tuple[int, int], float]) -> Interval:
    """The interval of a difference of two rows on the pairs and seeds that both have.

    Args:
        one: (pair, seed) → value.
        other: the same for the row that is subtracted.

    Raises:
        ValueError: they have no run in common.
    """
    shared = sorted(set(one) & set(other))
    if not shared:
        raise ValueError("the two rows have no pair and seed in common")
    values: dict[int, list[float]] = {}
    for pair, seed in shared:
        values.setdefault(pair, []).append(one[pair, seed] - other[pair, seed])
    return over_pairs(values)
