"""What methods cannot act beside, as data: facts that a host reports of itself, and requirements that options classes declare.

A host (TRL, Axolotl) fills `Facts` from its own configuration. `broken` compares them with the requirements of every method of a
block and returns all violations at once. The compatibility page is printed from the same requirements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from trl_safety.errors import AdapterError, ConfigurationError

Host = Literal["trl", "axolotl"]


class Declaring(Protocol):
    """What an options class says of its method's requirements; see `config/method.py`."""

    requirements: ClassVar[tuple[Requirement, ...]]
    shown: ClassVar[Mapping[str, str]]


@dataclass(frozen=True)
class Fact:
    """One thing that a host's configuration says.

    Attributes:
        value: what a requirement compares; None where it is not known yet, which breaks nothing.
        setting: the host's own words for it, with the value: `torch_compile = True`.
        spelt_out: whether the user wrote it, and not the host by itself.
        switch_off: turns it off in the host's configuration; None where that cannot be done.
    """

    value: Any
    setting: str
    spelt_out: bool = True
    switch_off: Callable[[], None] | None = None


@dataclass
class Facts:
    """What one host says of a run: `FACTS` name → `Fact`. A fact that is missing is not known."""

    host: Host
    known: Mapping[str, Fact] = field(default_factory=dict)


FACTS = {
    "adapter": "the kind of fine-tuning",
    "dora": "a LoRA variant whose update is not s·B·A",
    "initialisation": "an initialisation that changes the base weights",
    "expert_parameters": "LoRA on fused expert weights",
    "restarts": "an adapter that is merged into the base while training",
    "objective": "another objective than supervised fine-tuning",
    "engine": "how a run is spread over processes",
    "split_model": "a model or a loss that is split over processes",
    "trainer_class": "a trainer class of the user's own",
    "fused_kernels": "fused LoRA kernels",
    "base_weights": "how the frozen weights are stored",
    "rows": "how samples lie in the rows of a batch: plain, padding_free, packed, cut (packed and cut anywhere), mixed (packed, and seeing each other)",
    "compiled": "a compiled model",
    "precision": "the precision of training",
    "streamed": "training data without rows that can be counted",
    "batch_varies": "a batch size that the trainer changes by itself",
    "label_smoothing": "smoothed labels",
    "images": "training data with images",
    "replicated": "one process that replicates the model (DataParallel)",
    "batch": "samples of a per-device batch, where that is a fixed number; of an optimizer step, where a batch is one sample",
    "trained_besides": "parameters trained besides LoRA factors",
    "pickled": "adapters saved as pickles",
}
"""Every fact that a requirement may name."""


@dataclass(frozen=True, eq=False)
class Requirement:
    """What one or all methods need of one fact.

    Attributes:
        fact: a key of `FACTS`.
        refused: whether a value of the fact, beside a method's options, stops the method from acting.
        meaning: what the refused values are, for the table.
        reason: why the method could not act.
        remedy: what to change, in the words of each host; "any" where they are the same everywhere.
        when: whether the requirement holds for these options; by default always.
        when_text: the same in words, for the table: "with how: low_rank".
        switch_off: "unless_spelt_out" where the host's own choice is switched off and reported instead of refused; "always" where
            that changes no result, so that it is done even where the user spelt it out.
        error: the class that is raised.
        setting: a method's options → the option of its own that is in the way, with its value; by default the fact's setting is named.
    """

    fact: str
    refused: Callable[[Any, Any], bool]
    meaning: str
    reason: str
    remedy: Mapping[str, str]
    when: Callable[[Any], bool] = lambda options: True
    when_text: str = ""
    switch_off: Literal["never", "unless_spelt_out", "always"] = "never"
    error: type[AdapterError | ConfigurationError] = ConfigurationError
    setting: Callable[[Any], str] | None = None

    def __post_init__(self) -> None:
        if self.fact not in FACTS:
            raise ValueError(f"{self.fact!r} is no fact; known: {', '.join(FACTS)}")

    def remedy_for(self, host: Host) -> str:
        """The remedy in the host's words."""
        return self.remedy.get(host) or self.remedy["any"]


def is_true(value: Any, options: Any) -> bool:
    """A fact that must not be."""
    return bool(value)


def one_of(*values: Any) -> Callable[[Any, Any], bool]:
    """A fact that must be none of these."""
    return lambda value, options: value in values


def revised(requirement: Requirement, **changes: Any) -> Requirement:
    """The requirement with some of its attributes changed."""
    return replace(requirement, **changes)


@dataclass(frozen=True)
class Violation:
    """One requirement that a host's configuration breaks, and the methods that it stops."""

    requirement: Requirement
    fact: Fact
    methods: Mapping[str, Declaring]
    host: Host

    @property
    def text(self) -> str:
        """Setting with value, the methods, reason and remedy."""
        found = self.requirement
        name, options = next(iter(self.methods.items()))
        setting = f"{name}.{found.setting(options)} beside {self.fact.setting}" if found.setting else self.fact.setting
        reason = found.reason.replace("{value}", str(self.fact.value))
        return f"{setting}: {', '.join(self.methods)} cannot act: {reason}; {found.remedy_for(self.host)}"


def broken(methods: Mapping[str, Declaring], facts: Facts) -> list[Violation]:
    """Every requirement of the methods that the facts break, the general ones first.

    Args:
        methods: name → options, of a block.
        facts: of the host.
    """
    needed: dict[Requirement, list[str]] = {requirement: list(methods) for requirement in EVERY_METHOD}
    for name, options in methods.items():
        for requirement in options.requirements:
            needed.setdefault(requirement, []).append(name)
    found = []
    for requirement, names in needed.items():
        fact = facts.known.get(requirement.fact)
        if fact is None or fact.value is None:
            continue
        stopped = {
            name: methods[name] for name in names if requirement.when(methods[name]) and requirement.refused(fact.value, methods[name])
        }
        if stopped:
            found.append(Violation(requirement, fact, stopped, facts.host))
    return found


def resolve(methods: Mapping[str, Declaring], facts: Facts, *, dry: bool = False) -> list[str]:
    """Switch off what changes no result, or what the host chose by itself; refuse the rest, all of it at once.

    Args:
        methods: name → options, of a block.
        facts: of the host.
        dry: only refuse; what would be switched off stays as it is.

    Returns:
        What was switched off and why, a sentence each, for the log and the report.

    Raises:
        ConfigurationError: a method could not act; with one line per violation.
        AdapterError: likewise, where all that is violated concerns the adapter itself.
    """
    switched, refused = [], []
    for violation in broken(methods, facts):
        how, fact = violation.requirement.switch_off, violation.fact
        if fact.switch_off and (how == "always" or (how == "unless_spelt_out" and not fact.spelt_out)):
            if not dry:
                fact.switch_off()
            switched.append(
                f"{fact.setting} was switched off: {', '.join(violation.methods)} could not act: {violation.requirement.reason}"
            )
        else:
            refused.append(violation)
    refuse(refused)
    return switched


def refuse(violations: Sequence[Violation]) -> None:
    """Raise all violations as one error, where there are any. See `resolve`."""
    if not violations:
        return
    kinds = {violation.requirement.error for violation in violations}
    error = kinds.pop() if len(kinds) == 1 else ConfigurationError
    raise error("\n".join(violation.text for violation in violations))


def requirements_of(methods: Mapping[str, type[Declaring]]) -> list[Requirement]:
    """The requirements of every method and of each, once."""
    return list(dict.fromkeys([*EVERY_METHOD, *(found for options in methods.values() for found in options.requirements)]))


def cell(requirements: Sequence[Requirement], options: type[Declaring]) -> str:
    """What the compatibility table says of one method beside what one or several requirements refuse.

    Returns:
        "refused" or "switched off", with its condition, or the test that shows that the method acts; "not tried" where there is none.
    """
    own = next((found for found in requirements if found in EVERY_METHOD or found in options.requirements), None)
    if own is not None:
        words = {"never": "refused", "unless_spelt_out": "refused where spelt out, else switched off", "always": "switched off"}
        return f"{words[own.switch_off]} {own.when_text}".strip()
    test = options.shown.get(f"{requirements[0].fact}: {requirements[0].meaning}")
    return f"works (`{test}`)" if test else "not tried"


EVERY_METHOD: tuple[Requirement, ...] = (
    Requirement(
        "adapter",
        lambda value, options: value not in ("lora", "qlora"),
        "not lora or qlora (full fine-tuning included)",
        "the methods act on an update ΔW = s·B·A",
        {"axolotl": "set adapter: lora or qlora", "any": "use a LoraConfig"},
    ),
    Requirement("dora", is_true, "true", "DoRA's update is not s·B·A", {"axolotl": "remove peft_use_dora", "any": "set use_dora=False"}),
    Requirement(
        "initialisation",
        is_true,
        "anything that changes the base weights (pissa, olora, loftq, …)",
        "part of the aligned weight moves into the adapter",
        {"axolotl": "remove peft_init_lora_weights and peft.loftq_config", "any": "set init_lora_weights=True"},
    ),
    Requirement(
        "expert_parameters",
        is_true,
        "set",
        "fused expert weights have no alignment subspace",
        {"axolotl": "use lora_target_modules", "any": "use target_modules"},
    ),
    Requirement(
        "restarts",
        is_true,
        "set",
        "merges the adapter into the base again and again, so that ΔW is no longer what training changed",
        {"any": "remove relora and its steps"},
    ),
    Requirement(
        "objective",
        is_true,
        "set (dpo, kto, grpo, …)",
        "only supervised fine-tuning has been shown to work",
        {"any": "remove rl / reward_model"},
    ),
    Requirement(
        "engine",
        one_of("fsdp1"),
        "FSDP without fsdp_version: 2",
        "the first FSDP flattens the LoRA factors with other parameters, where no method can read them",
        {"any": "use fsdp_version: 2"},
        error=AdapterError,
    ),
    Requirement(
        "engine",
        one_of("zero3"),
        "DeepSpeed, ZeRO stage 3",
        "ZeRO stage 3 keeps every LoRA factor in pieces that only its own hooks put together, where no method can read them",
        {"any": "use stage 2, or FSDP with fsdp_version: 2"},
        error=AdapterError,
    ),
    Requirement(
        "engine",
        one_of("fsdp_sharded_checkpoints"),
        "FSDP with sharded state dicts",
        "checkpoints would hold no adapter and no safety report",
        {"any": "use FULL_STATE_DICT"},
        error=AdapterError,
    ),
    Requirement(
        "split_model",
        is_true,
        "above 1",
        "splits the model or the loss over processes, which has not been shown to work",
        {"any": "set it to 1 and use DDP"},
    ),
    Requirement(
        "pickled",
        is_true,
        "save_safetensors: false",
        "no report covers an adapter saved as a pickle",
        {"any": "remove save_safetensors"},
    ),
)
"""What every method needs."""

HOOKS_BESIDE_FUSED_KERNELS = Requirement(
    "fused_kernels",
    is_true,
    "true (Axolotl's own default on a GPU)",
    "fused kernels bypass the modules on which the buffer acts",
    {"axolotl": "set lora_qkv_kernel, lora_o_kernel and lora_mlp_kernel: false", "any": "turn the fused LoRA kernels off"},
    switch_off="always",
)
"""Of methods that act by hooks on modules. The kernels change no result."""

HOOKS_BESIDE_COMPILATION = Requirement(
    "compiled",
    is_true,
    "true",
    "a compiled model bypasses the buffer",
    {"axolotl": "remove torch_compile", "any": "turn it off"},
    switch_off="unless_spelt_out",
)
"""Likewise."""

PLUGIN_TRAINER = Requirement(
    "trainer_class",
    is_true,
    "set",
    "the method is part of the plugin's own trainer class, which Axolotl prefers in silence",
    {"any": "remove trainer_cls"},
)
"""Of methods that act in the loss, the gradient or the training step."""

BUFFERS = ("buffer", "are two buffers, of which the second would be trained on the first")
"""The group of methods that train on other weights than are used."""

_BESIDE = "tests/training/test_beside.py::test_acts_or_is_refused"
SHOWN = {
    "rows: packed so that samples are cut anywhere (TRL's wrapped) or attend to each other": _BESIDE,
    "compiled: true": _BESIDE,
    "trained_besides: set": _BESIDE,
    "streamed: streamed": _BESIDE,
    "batch: one sample, nothing accumulated": _BESIDE,
    "batch_varies: auto_find_batch_size": _BESIDE,
    "label_smoothing: above 0": _BESIDE,
}
"""What this package's tests show of all of its methods that have no requirement there."""
ON_SHARDS = {"engine: FSDP": "tests/training/test_engines.py::test_two_processes_equal_one"}
"""What they show of the methods that act on whole factors alone."""
