"""Options of a method from another package: weight decay of the update itself."""

from typing import Annotated, ClassVar

from pydantic import Field

from trl_safety import MethodOptions, Requirement


class ToyDecayConfig(MethodOptions):
    """The loss term λ Σ ‖ΔW‖²_F, which keeps the update small."""

    hook: ClassVar[str] = "toy_decay.hook:ToyDecay"
    source: ClassVar[str] = "toy decay, of a test"
    stage: ClassVar[str] = "loss"
    costs: ClassVar[str] = "two small Grams a layer"
    requirements: ClassVar[tuple[Requirement, ...]] = (
        Requirement("compiled", lambda value, options: bool(value), "true", "it has not been tried", {"any": "turn it off"}),
    )

    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ."""
