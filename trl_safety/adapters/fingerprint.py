"""Recognise a model by sampled entries of its weights, in full precision, cast or quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_safety.adapters.shards import whole

NOT_VERIFIED = "not verified"
"""How a report's sentence on the base model begins if its weights were not compared with anything."""

CERTAIN = 3.0
"""How many standard errors it takes to say that quantised weights are one model's and not the other's."""

FINGERPRINT_ENTRIES = 256

FULL_PRECISION_DIFFERENCE = 1e-6
"""Weights of the same model are equal once both are in the narrower of their dtypes."""

CASTS = (torch.float32, torch.bfloat16, torch.float16)

QUANTISED_DIFFERENCE = 0.5
"""NF4 moves a layer by about a tenth of its norm, 2-bit formats by a third; another model's weights differ by more than their norm."""


class Recognition:
    """Tells layer by layer whether weights are an aligned model's; quantised layers, each too coarse to tell, also all together.

    For quantised weights w = a + e, with a the aligned and b the base model's, Σ (‖w − b‖² − ‖w − a‖²) / Σ ‖a − b‖² is +1 in
    expectation, and −1 for w = b + e. Its standard error, estimated from the entries, says whether that tells the two apart.
    """

    def __init__(self) -> None:
        self._closer, self._apart, self._variance = 0.0, 0.0, 0.0

    def add(self, weight: Tensor, samples: Tensor, *, quantised: bool) -> float:
        """Look at one layer.

        Args:
            weight: as it is in the model.
            samples: (2, 256) `sample`d entries of the base and of the aligned model.
            quantised: whether the weight was dequantised.

        Returns:
            The layer's relative distance from the aligned one, if that is more than a cast or the quantisation explains; else 0.
        """
        if not quantised:
            to_aligned = relative_differences(weight, samples)[0]
            return 0.0 if to_aligned <= FULL_PRECISION_DIFFERENCE else to_aligned
        base, aligned = samples.double()
        entries = sample(weight).double()
        scale = torch.linalg.vector_norm(aligned).clamp(min=1e-30)
        change = (aligned - base) / scale
        errors = torch.stack([entries - aligned, entries - base]) / scale
        nearest = errors[errors.square().sum(1).argmin()]
        self._closer += (errors[1].square() - errors[0].square()).sum().item()
        self._apart += change.square().sum().item()
        self._variance += 4 * (change * nearest).square().sum().item()
        to_aligned = torch.linalg.vector_norm(errors[0]).item()
        # A NaN is a difference, too.
        return 0.0 if to_aligned <= QUANTISED_DIFFERENCE else to_aligned

    @property
    def _verdict(self) -> tuple[float, float] | None:
        """The statistic and its standard error."""
        return (self._closer / self._apart, self._variance**0.5 / self._apart) if self._apart else None

    @property
    def unaligned(self) -> float:
        """By how much all quantised layers together are closer to the base than to the aligned model; 0 unless that is certain."""
        if self._verdict is None:
            return 0.0
        value, error = self._verdict
        return -value if value < 0 and 1 - value > CERTAIN * error else 0.0

    @property
    def qualifier(self) -> str:
        """What the report adds to its verdict."""
        if self._verdict is None:
            return ""
        value, error = self._verdict
        if value < 0 or value + 1 <= CERTAIN * error:
            return ", up to quantisation, which is too coarse here to tell the aligned model from the base"
        return ", up to quantisation"


def relative_differences(weight: Tensor, samples: Tensor) -> tuple[float, float, float]:
    """Relative distances over sampled entries: from a loaded weight to the aligned and to the base model's, as they are or cast as
    the loaded one may have been, and between those two. `samples` is (2, 256), the base's and the aligned model's.
    """
    entries = sample(weight).float()
    norms = torch.linalg.vector_norm(samples, dim=1).clamp(min=1e-30)
    casts = torch.stack([torch.linalg.vector_norm(entries - samples.to(cast).float(), dim=1) for cast in CASTS])
    to_base, to_aligned = (casts.min(dim=0).values / norms).tolist()
    return to_aligned, to_base, (torch.linalg.vector_norm(samples[1] - samples[0]) / norms[1]).item()


def same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal once both are in 16 bits: one model, stored twice."""
    return any(torch.equal(one.to(cast), other.to(cast)) for cast in CASTS)


def sample(weight: Tensor) -> Tensor:
    """256 entries of a weight at positions that depend on its size alone, on the CPU; of a sharded one, on every process."""
    weight = whole(weight.detach())
    return weight.flatten()[positions(weight.numel()).to(weight.device)].cpu()


def positions(size: int) -> Tensor:
    """Which entries of a flattened weight of this size are sampled, (256,)."""
    return torch.randint(size, (FINGERPRINT_ENTRIES,), generator=torch.Generator().manual_seed(size))
