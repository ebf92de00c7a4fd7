"""What methods cannot be combined with, as data: facts that a host reports about itself, and requirements that options classes declare.

A host (TRL, Axolotl) fills `Facts` from its own configuration. `broken` compares them with the requirements of every method of a
block and returns all violations at once. The compatibility page is generated from the same requirements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from trl_safety.errors import AdapterError, ConfigurationError

Host = Literal["trl", "axolotl"]


class Declaring(Protocol):
    """What an options class declares about its method's requirements; see `config/method.py`."""

    requirements: ClassVar[tuple[Requirement, ...]]
    shown: ClassVar[Mapping[str, str]]


@dataclass(frozen=True)
class Fact:
    """One fact about a host's configuration.

    Attributes:
        value: what a requirement compares; None if it is not known yet, which violates nothing.
        setting: the host's own name for it, with the value: `torch_compile = True`.
        spelt_out: whether the user set it, rather than the host by default.
        switch_off: switches it off in the host's configuration; None if that is impossible.
    """

    value: Any
    setting: str
    spelt_out: bool = True
    switch_off: Callable[[], None] | None = None


@dataclass
class Facts:
    """What one host reports about a run: name in `FACTS` → `Fact`. A missing fact is not known."""

    host: Host
    known: Mapping[str, Fact] = field(default_factory=dict)


FACTS = {
    "adapter": "the kind of fine-tuning",
    "dora": "a LoRA variant whose update is not s·B·A",
    "initialisation": "an initialisation that changes the base weights",
    "expert_parameters": "LoRA on fused expert weights",
    "restarts": "an adapter that is merged into the base during training",
    "objective": "what is trained for: sft, dpo, kto, grpo, …",
    "reference": "where the log-probabilities of a reference model come from",
    "engine": "how a run is distributed over processes",
    "split_model": "a model or a loss that is split over processes",
    "trainer_class": "a custom trainer class",
    "fused_kernels": "fused LoRA kernels",
    "unsloth": "a model or a trainer that Unsloth has rewritten",
    "base_weights": "how the frozen weights are stored",
    "rows": "how samples lie in the rows of a batch: plain, padding_free, packed, cut (packed and cut anywhere), mixed (packed, and seeing each other)",
    "compiled": "a compiled model",
    "precision": "the precision of training",
    "streamed": "training data without rows that can be counted",
    "batch_varies": "a batch size that the trainer may change",
    "label_smoothing": "smoothed labels",
    "images": "training data with images",
    "replicated": "one process that replicates the model (DataParallel)",
    "batch": "number of samples in a per-device batch, where that is fixed; in an optimizer step, if a batch is one sample",
    "trained_besides": "trainable parameters other than LoRA factors",
    "pickled": "adapters saved as pickles",
}
"""Every fact that a requirement may name."""


@dataclass(frozen=True, eq=False)
class Requirement:
    """What one method, or every method, requires of one fact.

    Attributes:
        fact: a key of `FACTS`.
        refused: whether a value of the fact, together with a method's options, stops the method from acting.
        meaning: what the refused values are, for the table.
        reason: why the method could not act.
        remedy: what to change, in each host's terms; "any" if they are the same for all hosts.
        when: whether the requirement applies to these options; by default always.
        when_text: the same in words, for the table: "with how: low_rank".
        switch_off: "unless_spelt_out" if the host's default is switched off and reported instead of refused; "always" if
            switching it off changes no result, so that it is done even if the user set it.
        error: the class that is raised.
        setting: a method's options → the method's own option that conflicts, with its value; by default the fact's setting is named.
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
            raise ValueError(f"{self.fact!r} is not a fact; known: {', '.join(FACTS)}")

    def remedy_for(self, host: Host) -> str:
        """The remedy in the host's terms."""
        return self.remedy.get(host) or self.remedy["any"]


def is_true(value: Any, options: Any) -> bool:
    """Refuse any true value."""
    return bool(value)


def one_of(*values: Any) -> Callable[[Any, Any], bool]:
    """Refuse any of these values."""
    return lambda value, options: value in values


def revised(requirement: Requirement, **changes: Any) -> Requirement:
    """The requirement with some of its attributes changed."""
    return replace(requirement, **changes)


@dataclass(frozen=True)
class Violation:
    """One requirement that a host's configuration violates, and the methods that it stops."""

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
    """Every requirement of the methods that the facts violate, the general ones first.

    Args:
        methods: name → options, of a block.
        facts: the host's facts.
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
    """Switch off what changes no result, or what the host set by default; refuse the rest, all at once.

    Args:
        methods: name → options, of a block.
        facts: the host's facts.
        dry: only refuse; leave on what would be switched off.

    Returns:
        What was switched off and why, one sentence each, for the log and the report.

    Raises:
        ConfigurationError: a method could not act; the message has one line per violation.
        AdapterError: the same, if all violations concern the adapter itself.
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
    """Raise all violations as one error, if there are any. See `resolve`."""
    if not violations:
        return
    kinds = {violation.requirement.error for violation in violations}
    error = kinds.pop() if len(kinds) == 1 else ConfigurationError
    raise error("\n".join(violation.text for violation in violations))


def requirements_of(methods: Mapping[str, type[Declaring]]) -> list[Requirement]:
    """The requirements that every method has, and those of each method, without duplicates."""
    return list(dict.fromkeys([*EVERY_METHOD, *(found for options in methods.values() for found in options.requirements)]))


def cell(requirements: Sequence[Requirement], options: type[Declaring]) -> str:
    """The compatibility table's entry for one method and what one or more requirements refuse.

    Returns:
        "refused" or "switched off", with its condition; or the test that shows that the method acts; "not tried" if there is none.
    """
    own = next((found for found in requirements if found in EVERY_METHOD or found in options.requirements), None)
    if own is not None:
        words = {"never": "refused", "unless_spelt_out": "refused if set by the user, else switched off", "always": "switched off"}
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
        "merges the adapter into the base repeatedly, so ΔW is no longer what training changed",
        {"any": "remove relora and its steps"},
    ),
    Requirement(
        "objective",
        one_of("ebft", "asyncgrpo", "reward", "prm"),
        "ebft, grpo with async_prefetch or use_data_producer, or a reward model",
        "it has not been shown to work",
        {
            "axolotl": "use rl: dpo, ipo, kto, orpo, simpo or grpo without async_prefetch and use_data_producer, or none; remove reward_model",
            "any": "use SFT, DPO, KTO or GRPO",
        },
    ),
    Requirement(
        "engine",
        one_of("fsdp1"),
        "FSDP without fsdp_version: 2",
        "FSDP1 flattens the LoRA factors together with other parameters, where no method can read them",
        {"any": "use fsdp_version: 2"},
        error=AdapterError,
    ),
    Requirement(
        "engine",
        one_of("zero3"),
        "DeepSpeed, ZeRO stage 3",
        "ZeRO stage 3 keeps every LoRA factor in shards that only its own hooks gather, so no method can read them",
        {"any": "use stage 2, or FSDP with fsdp_version: 2"},
        error=AdapterError,
    ),
    Requirement(
        "engine",
        one_of("fsdp_sharded_checkpoints"),
        "FSDP with sharded state dicts",
        "checkpoints would contain no adapter and no safety report",
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
    "fused kernels bypass the modules that the buffer acts on",
    {"axolotl": "set lora_qkv_kernel, lora_o_kernel and lora_mlp_kernel: false", "any": "turn the fused LoRA kernels off"},
    switch_off="always",
)
"""For methods that act through hooks on modules. The kernels change no result."""

HOOKS_BESIDE_COMPILATION = Requirement(
    "compiled",
    is_true,
    "true",
    "a compiled model bypasses the buffer",
    {"axolotl": "remove torch_compile", "any": "turn it off"},
    switch_off="unless_spelt_out",
)
"""For methods that act through hooks on modules."""

UNSLOTH = Requirement(
    "unsloth",
    is_true,
    "true",
    "Unsloth's kernels compute a layer by themselves and bypass the modules on which the buffer acts",
    {"any": "load the model with Transformers, in a process that does not import unsloth"},
)
"""Of methods that do more than read the factors."""

BESIDE_A_BUFFER = (
    Requirement(
        "objective",
        lambda value, options: value not in ("sft", "dpo", "kto", "orpo", "cpo"),
        "grpo, and every other whose model generates",
        "what the model generates while it trains comes from weights with the buffer in them, which are not those that will be used, so that another "
        "model's answers are rewarded",
        {"axolotl": "use rl: dpo, ipo, kto, orpo or simpo, or remove the buffer", "any": "use SFT, DPO or KTO, or remove the buffer"},
    ),
    Requirement(
        "reference",
        one_of("precomputed", "second_model"),
        "computed before training, or by a second model",
        "the reference's log-probabilities come from weights without the buffer that is in the policy's, so that the loss compares two models",
        {
            "axolotl": "remove precompute_ref_log_probs and rl_adapter_ref_model: the reference is the model without its adapter",
            "any": "set precompute_ref_log_probs=False and give no ref_model: the reference is the model without its adapter",
        },
    ),
)
"""Of methods that train on other weights than are used."""

PLUGIN_TRAINER = Requirement(
    "trainer_class",
    is_true,
    "set",
    "the method is part of the plugin's own trainer class, which Axolotl silently prefers",
    {"any": "remove trainer_cls"},
)
"""For methods that act in the loss, the gradient or the training step."""

BUFFERS = ("buffer", "are both buffers, and the second would be trained on top of the first")
"""The group of methods whose training uses other model weights than inference."""

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
"""What this package's tests show for all of its methods that have no requirement there."""
ON_SHARDS = {"engine: FSDP": "tests/training/test_engines.py::test_two_processes_equal_one"}
"""What they show for the methods that act only on whole factors."""
_PREFERENCE = "tests/training/test_preference.py"
OUTSIDE_SFT = {
    "objective: any but supervised fine-tuning": f"{_PREFERENCE}::test_a_run_with_a_correction",
    "objective: grpo, and every other whose model generates": f"{_PREFERENCE}::test_a_run_with_a_correction",
}
"""What they show in DPO, KTO and GRPO for the methods of that test."""
BUFFER_OUTSIDE_SFT = {"objective: any but supervised fine-tuning": f"{_PREFERENCE}::test_policy_and_reference_see_the_same_buffer"}
"""What they show there for the buffers."""
