"""Every option of every method, once.

`SafeSFTConfig`, the CLI and the Axolotl plugin read these classes; nothing else defines an option. All of them forbid
unknown keys and non-finite numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from trl_safety.errors import ConfigurationError

Operator = Literal["scaled", "orthogonal"]


def _takes_boolean(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_boolean(part) for part in get_args(annotation))


class Options(BaseModel):
    """Base of all option blocks: unknown keys are errors, numbers are finite, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, data: Any) -> Any:
        # YAML's `weight: off` would be 0, and `max_attack: yes` a threshold of 1.
        for name, value in data.items() if isinstance(data, Mapping) else ():
            if isinstance(value, bool) and name in cls.model_fields and not _takes_boolean(cls.model_fields[name].annotation):
                raise ValueError(f"{name} = {value}: is a truth value, not what this option takes")
        return data


class SubspaceConfig(Options):
    """Build the alignment subspace from a pair of checkpoints before training. Exactly one of rank, tolerance, whole."""

    base: str
    """The unaligned model: a local folder or a Hub id. Full precision, safetensors."""
    aligned: str
    """The aligned model that is fine-tuned: a local folder or a Hub id. Full precision, safetensors."""
    base_revision: str | None = None
    """Hub revision of `base`."""
    aligned_revision: str | None = None
    """Hub revision of `aligned`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Keep this many singular directions of every layer."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep as many as bring the error of C, relative to its norm, below this: σ²ₖ₊₁ ≤ tolerance · σ²₁."""
    whole: bool = False
    """Keep V itself, for an exact C."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint, to learn its module names."""

    @model_validator(mode="after")
    def _one_cut(self) -> SubspaceConfig:
        if sum((self.rank is not None, self.tolerance is not None, self.whole)) != 1:
            raise ValueError("give exactly one of rank (e.g. 64), tolerance (e.g. 0.001) or whole: true")
        return self


class AsftConfig(Options):
    """AsFT (arXiv 2506.08473): the loss term λ Σ ‖(I − C) ΔW‖²_F."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ. The paper found 0.1 to 10 to work. 0 measures and logs the penalty and protects nothing."""
    operator: Operator = "scaled"
    """How the alignment subspace acts, see `safe_lora.operator`."""
    scaled: bool = False
    """Penalise ΔW = s·B·A with PEFT's scaling s; false is the authors' ΔW = B·A."""
    paper_lambda: bool = False
    """Count λ once per micro-batch as the authors' code does, so that it grows with gradient accumulation."""


class DualSelectConfig(Options):
    """DualSelect (arXiv 2606.09866): references and samples chosen by their gradients, and the reference gradient as a correction."""

    reference_dataset: str | dict[str, Any] | None = None
    """The pool of safety references: a local file (.jsonl, .json, .csv, .parquet), a dataset folder or a Hub id; in Axolotl also an
    entry as under `datasets`. Rows with a prompt and no answer are held to the starting model's distribution by KL."""
    warmup_steps: Annotated[int, Field(ge=1)] = 10
    """n₀: plain optimizer steps before the first refresh, whose gradients are the first task direction."""
    refresh_steps: Annotated[int, Field(ge=1)] | None = None
    """Score the pool again every so many optimizer steps; null: after the warm-up and then once an epoch."""
    selection: Literal["hard", "soft"] = "hard"
    """'hard' keeps samples with weight 1, 'soft' weights them by softmin(score / T)."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """K: samples kept of each per-device batch. Default 4. Of a batch that is not full, the same share."""
    keep_tokens: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `keep`: the share of each batch's supervised tokens that is kept at most (the paper: 0.9)."""
    references: Annotated[int, Field(ge=1)] | None = None
    """K_ref: references chosen at each refresh. Default 32."""
    reference_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of `references`: the share of the pool, rounded up (the paper: 0.1)."""
    rho: Annotated[float, Field(ge=0)] = 0.2
    """ρ: weight of the reference gradient in each update. 0 selects samples and corrects nothing."""
    mu_task: Annotated[float, Field(ge=0)] = 1.0
    """μ of the samples' scores."""
    mu_reference: Annotated[float, Field(ge=0)] = 1.0
    """μ of the references' scores."""
    nu: Annotated[float, Field(ge=0)] = 1.0
    """ν: weight of the gradients' conflict in both scores."""
    task_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the soft weights of samples."""
    reference_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the soft weights of references."""
    reference_gradient: Literal["cached", "fresh"] = "cached"
    """'cached': the mean gradient at the last refresh (authors). 'fresh': that of a batch of the chosen references in every step."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if data.get("keep") is None and data.get("keep_tokens") is None:
            data["keep"] = 4
        if data.get("references") is None and data.get("reference_share") is None:
            data["references"] = 32
        return data

    @model_validator(mode="after")
    def _one_of_each(self) -> DualSelectConfig:
        if (self.keep is None) == (self.keep_tokens is None):
            raise ValueError("give either keep (e.g. 4) or keep_tokens (e.g. 0.9), not both")
        if (self.references is None) == (self.reference_share is None):
            raise ValueError("give either references (e.g. 32) or reference_share (e.g. 0.1), not both")
        if self.selection == "hard" and (unused := [n for n in ("task_temperature", "reference_temperature") if getattr(self, n) != 0.1]):
            raise ValueError(f"{unused[0]} = {getattr(self, unused[0]):g} is used with selection: soft alone: remove it, or select softly")
        if self.reference_gradient == "fresh" and self.rho == 0:
            raise ValueError("reference_gradient = 'fresh' is not used with rho = 0, which adds no reference gradient: remove one of the two")
        if self.nu == 0 and self.rho == 0:
            raise ValueError("nu = 0 and rho = 0: the references would be neither compared with the samples nor added to the update")
        return self


class ReinforceMergeConfig(Options):
    """How a user's adapter and a ReinforceLoRA become one: w_U·W_U + w_R·(I − αQQᵀ)·W_R."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """α: how much of the ReinforceLoRA's part in the user's output directions is removed."""
    user_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_U: weight of the user's update in the merged adapter."""
    reinforce_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_R: weight of the orthogonalised ReinforceLoRA in the merged adapter."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Cut the merged adapter, of the sum of both ranks, back to this; the report has the energy lost."""
    collapse_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """τ: eigenvalues of AAᵀ of the user's A that are at most τ times the largest do not count as the user's directions (rank collapse)."""


class BufferReinforceConfig(ReinforceMergeConfig):
    """Buffer-and-Reinforce (arXiv 2605.24550): train beside a frozen jailbreak buffer, detach it, merge with a reinforcing LoRA by QR."""

    buffer: str
    """Folder or Hub id of a BufferLoRA made by `trl-safety buffer`. It acts in training steps alone and is in no file of the run."""
    reinforce: str | None = None
    """Folder or Hub id of a ReinforceLoRA made by `trl-safety reinforce`; null trains beside the buffer and merges nothing."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> BufferReinforceConfig:
        given = self.model_dump(exclude_defaults=True, include=set(ReinforceMergeConfig.model_fields))
        if self.reinforce is None and given:
            option, value = next(iter(given.items()))
            raise ValueError(f"{option} = {value!r} is used in the merge alone: give reinforce, or remove {option}")
        return self


class CorrectionConfig(Options):
    """What all corrections of a trained adapter share."""

    corrected_checkpoints: bool = False
    """Write a corrected copy into `checkpoint-N/safety/corrected/`; the checkpoint itself stays resumable, uncorrected."""

    @property
    def idle(self) -> str | None:
        """Why these options change nothing on any adapter; None where they may. A sweep may hold such a point, a run may not."""
        return None


class SafeLoraConfig(CorrectionConfig):
    """Safe LoRA (arXiv 2405.16833): replace B by C·B in the layers whose update is least aligned."""

    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """τ: correct the layers with cos(C·ΔW, ΔW) ≤ τ, rounded to 5 decimals as in the authors' code. Default 0.5."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """K: correct the K layers with the smallest cosine, instead of a threshold."""
    operator: Operator = "scaled"
    """How the alignment subspace acts: 'scaled' is the authors' C = VVᵀ/‖V‖_F, 'orthogonal' the projector UₖUₖᵀ."""

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        if self.threshold is not None and self.threshold < 0:
            return f"threshold = {self.threshold:g}: no cosine with C·ΔW is negative, since C and the projector are positive semidefinite"
        return None

    @model_validator(mode="before")
    @classmethod
    def _default_threshold(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("threshold") is None and data.get("layers") is None:
            return {**data, "threshold": 0.5}
        return data

    @model_validator(mode="after")
    def _one_choice(self) -> SafeLoraConfig:
        if (self.threshold is None) == (self.layers is None):
            raise ValueError("give either threshold (e.g. 0.35) or layers (e.g. 10), not both")
        return self


class CsuloraConfig(CorrectionConfig):
    """CSULoRA (arXiv 2605.30640), a RECONSTRUCTION: keep the aligned part of ΔW, attenuate the rest by its energy."""

    lambda_partial: Annotated[float, Field(ge=0)] = 1.0
    """λ_M: attenuation of the part that is aligned on one side only."""
    lambda_outside: Annotated[float, Field(ge=0)] = 1.0
    """λ_O: attenuation of the part outside the subspace."""
    output_rank: Literal["exact", "original"] = "exact"
    """'exact' doubles the adapter's rank and loses nothing; 'original' cuts back and reports the energy lost."""

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        return "lambda_partial = 0 and lambda_outside = 0: nothing is attenuated" if self.lambda_partial == self.lambda_outside == 0 else None


class AlignmentVectorConfig(CorrectionConfig):
    """The signed alignment vector (RESTA, arXiv 2402.11746): ΔW ← κ·ΔW + γ·V, appended to the adapter's factors."""

    gamma: Annotated[float, Field(ge=-4, le=4)] = 1.0
    """γ: how much of V = W_aligned − W_base is added. 0 adds nothing; negative takes alignment out."""
    kappa: Annotated[float, Field(ge=0, le=1)] = 1.0
    """κ: what is kept of the user's update."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """k: V's leading directions to add; null: all that the subspace keeps."""
    cut_to: Annotated[int, Field(ge=1)] | None = None
    """Cut the corrected adapter, of rank r + k, back to this; the report has the energy lost."""
    all_layers: bool = False
    """Add V also to layers of the subspace that the adapter does not have."""
    dare: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """DARE (arXiv 2311.03099): share of B's entries to drop at random, the others rescaled."""
    seed: int = 0
    """Of DARE's choice."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> AlignmentVectorConfig:
        if self.seed and not self.dare:
            raise ValueError(f"seed = {self.seed} is used by dare alone: give dare, or remove seed")
        return self

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        return "gamma = 0: nothing of V is added" if self.gamma == 0 else None


class AlignmentBufferConfig(Options):
    """A data-free buffer: train the adapter on W_aligned − γ·V, then put it on W_aligned. With γ = 1 that is the unaligned base itself."""

    gamma: Annotated[float, Field(ge=0, le=4)] = 1.0
    """γ: how much of V is taken out while training. 0 is plain fine-tuning and protects nothing."""
    how: Literal["weights", "low_rank"] = "weights"
    """'weights' reads W_aligned − γV from the two checkpoints into the frozen weights, and W_aligned back for every evaluation: exact, no
    memory, no time in a step. 'low_rank' takes the subspace's part of V out by a frozen low-rank adapter in training steps."""
    embeddings: bool = True
    """With 'weights': also the embeddings and the output head; false where the base has not learnt the chat template's tokens."""
    base: str | None = None
    """With 'weights': the unaligned model, folder or Hub id; null: that of `safety.subspace`."""
    aligned: str | None = None
    """With 'weights': the aligned model's checkpoint; null: that of `safety.subspace`, else the one that was loaded."""
    base_revision: str | None = None
    """Hub revision of `base`."""
    aligned_revision: str | None = None
    """Hub revision of `aligned`."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> AlignmentBufferConfig:
        if self.how == "low_rank":
            unused = [name for name in ("base", "aligned", "base_revision", "aligned_revision") if getattr(self, name) is not None]
            unused += ["embeddings"] if not self.embeddings else []
            if unused:
                raise ValueError(
                    f"{unused[0]} = {getattr(self, unused[0])!r} is not used with how: low_rank, which takes V from safety.subspace"
                )
        return self


class SafetyEvalConfig(Options):
    """Ask a small set of prompts while training, so that a loss of safety is seen while it happens. Judged by phrases of refusal."""

    harmful: str
    """JSON lines with `prompt`: the share that is complied with is logged as safety/attack."""
    benign: str | None = None
    """JSON lines with `prompt`: the share that is refused is logged as safety/over_refusal."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Every so many optimizer steps, and when training ends."""
    most_prompts: Annotated[int, Field(ge=1)] = 64
    """Of each set, the first so many: the cost of one evaluation."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Length of a completion."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts at a time."""
    stop_above: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stop training where the attack rate exceeds this; null: never. Not with a correction, which acts after what is measured."""


def _kind(value: Any) -> str:
    return "<pair>" if isinstance(value, Mapping | SubspaceConfig) else "<path>"


# Told apart by their type, so that a complaint about a pair is not also one about a path.
SubspaceSource = Annotated[Annotated[str, Tag("<path>")] | Annotated[SubspaceConfig, Tag("<pair>")], Discriminator(_kind)]


class SafetyConfig(Options):
    """The `safety` block: what protects the model, and from which alignment subspace."""

    subspace: SubspaceSource | None = None
    """A subspace file made by `trl-safety subspace`, a Hub id, or a {base, aligned, rank} pair to build it from."""
    skip_modules: list[str] = Field(default_factory=list)
    """Adapted modules (name or its ending) that every method leaves alone. The report lists them. No entry may match nothing."""
    dual_select: DualSelectConfig | None = None
    asft: AsftConfig | None = None
    safe_lora: SafeLoraConfig | None = None
    csulora: CsuloraConfig | None = None
    alignment_vector: AlignmentVectorConfig | None = None
    alignment_buffer: AlignmentBufferConfig | None = None
    buffer_reinforce: BufferReinforceConfig | None = None
    eval: SafetyEvalConfig | None = None
    """Protects nothing: it shows."""

    @model_validator(mode="before")
    @classmethod
    def _no_empty_methods(cls, data: Any) -> Any:
        # In YAML `asft:` with nothing behind it is null, which would switch off what the user wrote down to have.
        if isinstance(data, Mapping) and (empty := [name for name in METHODS if name in data and data[name] is None]):
            write = f"`{empty[0]}: {{}}` for its defaults" if empty[0] != "buffer_reinforce" else "its options behind it"
            raise ValueError(f"{empty[0]} has nothing behind it: write {write}, or remove the key")
        if isinstance(data, Mapping) and "eval" in data and data["eval"] is None:
            raise ValueError("eval has nothing behind it: name the harmful prompts, or remove the key")
        return data

    @model_validator(mode="after")
    def _acts(self) -> SafetyConfig:
        if not self.methods():
            raise ValueError(f"names no method, so that nothing would be protected: add one of {', '.join(METHODS)}")
        corrections = [name for name in CORRECTIONS if getattr(self, name)]
        if len(corrections) > 1:
            raise ValueError(f"{' and '.join(corrections)} both rewrite the trained adapter: keep one of them")
        if self.skip_modules and (
            buffer := "alignment_buffer" if self.alignment_buffer else "buffer_reinforce" if self.buffer_reinforce else None
        ):
            raise ValueError(
                f"skip_modules = {self.skip_modules!r}: {buffer} acts on the whole model and cannot leave layers alone; remove one of the two"
            )
        if self.skip_modules and self.dual_select:
            raise ValueError(
                f"skip_modules = {self.skip_modules!r}: dual_select steers the whole update and cannot leave layers alone; remove one of the two"
            )
        if self.correction and self.correction.idle:
            name = next(name for name in CORRECTIONS if getattr(self, name))
            raise ValueError(f"{name}.{self.correction.idle}, so that it would do nothing: choose another value, or remove {name}")
        if self.alignment_buffer and self.buffer_reinforce:
            raise ValueError(
                "alignment_buffer and buffer_reinforce are two buffers, of which the second would be trained on the first: keep one of them"
            )
        if self.alignment_vector and self.buffer_reinforce and self.buffer_reinforce.reinforce:
            raise ValueError(
                "alignment_vector would be weighted down by buffer_reinforce's merge: keep one of them, or remove buffer_reinforce.reinforce"
            )
        if not self.needs_subspace():
            # The buffer may read from a subspace which pair it is of.
            named = self.alignment_buffer is not None and self.alignment_buffer.base and self.alignment_buffer.aligned
            settings = () if self.alignment_buffer and not named else ("subspace", "skip_modules")
            ignored = [name for name in settings if getattr(self, name)]
            if ignored:
                raise ValueError(f"{ignored[0]} = {getattr(self, ignored[0])!r} is used by none of {', '.join(self.methods())}: remove it")
        return self

    def needs_subspace(self) -> bool:
        """Whether a method of the block reads an alignment subspace."""
        low_rank = self.alignment_buffer is not None and self.alignment_buffer.how == "low_rank"
        return low_rank or any(name in NEED_SUBSPACE for name in self.methods())

    @property
    def correction(self) -> CorrectionConfig | None:
        """The correction of the trained adapter, where there is one."""
        return next((getattr(self, name) for name in CORRECTIONS if getattr(self, name)), None)

    def methods(self) -> dict[str, Options]:
        """The methods that are on, by name, in the order in which they act."""
        return {name: getattr(self, name) for name in METHODS if getattr(self, name) is not None}

    @classmethod
    def parse(cls, source: SafetyConfig | Mapping[str, Any] | str | Path) -> SafetyConfig:
        """Read a `safety` block.

        Args:
            source: an instance, a mapping with the block's keys, or a YAML file that holds the block or, under the key
                `safety`, the block among other keys.

        Raises:
            ConfigurationError: the file cannot be read, or an option is unknown, out of bounds or contradictory. The
                message has a line per option with its full name, its value and the remedy.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            source = _block_of(read_yaml(Path(source), "safety"))
        if not isinstance(source, Mapping):
            raise ConfigurationError(
                f"safety = {source!r}: expected a SafetyConfig, a mapping or the path of a YAML file, got {type(source).__name__}"
            )
        return validate(cls, source, "safety")


METHODS = ("alignment_buffer", "dual_select", "asft", "safe_lora", "csulora", "alignment_vector", "buffer_reinforce")
CORRECTIONS = ("safe_lora", "csulora", "alignment_vector")
NEED_SUBSPACE = ("asft", *CORRECTIONS)
T = TypeVar("T", bound=Options)


def validate(cls: type[T], options: Mapping[str, Any], where: str) -> T:
    """Build `cls` from a mapping; every complaint names the option under `where`, its value and the remedy.

    Raises:
        ConfigurationError: with one line per wrong option.
    """
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        lines = [_explain(cls, item, where) for item in error.errors()]
    raise ConfigurationError("\n".join(lines))


def _explain(cls: type[BaseModel], item: Any, where: str) -> str:
    location = [str(part) for part in item["loc"] if not str(part).startswith(("<", "function-"))]
    name = ".".join([where, *location])
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{name} = {item['input']!r}: unknown option; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name} = {item['input']!r}: {message}"


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    for key in path:
        field = cls.model_fields.get(key)
        nested = _models_in(field.annotation) if field else []
        if not nested:
            return []
        cls = nested[0]
    return sorted(cls.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def read_yaml(path: Path, setting: str) -> Any:
    """A YAML file's content.

    Raises:
        ConfigurationError: it cannot be read, is no YAML, or has a key twice, of which YAML keeps the last in silence.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506  # a subclass of the safe loader
    except OSError as error:
        raise ConfigurationError(f"{setting} = {str(path)!r}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{setting} = {str(path)!r}: is not valid YAML: {error}") from error


def _block_of(content: Any) -> Any:
    return content["safety"] if isinstance(content, Mapping) and "safety" in content else content
