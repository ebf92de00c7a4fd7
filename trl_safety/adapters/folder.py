"""Adapter folders as PEFT writes them: read as factors by module name, written whole or not at all, no model loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft import __version__ as peft_version
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_safety.adapters.files import is_newer, new_folder
from trl_safety.adapters.lora import DIVERGED, check_config, strays
from trl_safety.adapters.names import WRAPPERS, strip_wrappers
from trl_safety.errors import AdapterError, reason
from trl_safety.linalg.finite import is_finite
from trl_safety.linalg.low_rank import is_zero_product, product_norm_squared

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
COPIED_SUFFIXES = {".json", ".jinja", ".md", ".model", ".txt"}
NOT_COPIED = {CONFIG, "trainer_state.json"}
"""Tokenizer, chat template and card travel with the adapter; the state of the run that made it does not."""
PEFT_PREFIX = "base_model.model."
NEGLIGIBLE = 1e-12
"""‖ΔW‖ of a layer that changes nothing: float32 rounds a weight of 1e-5 by as much, and bfloat16 one of 1e-10."""
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Factors:
    """One layer's LoRA factors: ΔW = scaling · B · A, with B (out, r) and A (r, in)."""

    B: Tensor
    A: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether the layer has no update: B, A or the scaling is zero, the product cancels, or s·B·A is too small to move any weight."""
        if self.scaling == 0 or is_zero_product(self.B, self.A):
            return True
        return abs(self.scaling) * float(product_norm_squared(self.B.double(), self.A.double()).clamp(min=0).sqrt()) <= NEGLIGIBLE


class AdapterFolder:
    """A saved LoRA adapter.

    Attributes:
        path: the folder.
        config: PEFT's LoraConfig, as PEFT reads it.
        factors: module name (as the model class knows it) → `Factors`.
        others: the remaining tensors (modules_to_save, biases, …), untouched by every method.
    """

    def __init__(self, path: Path, config: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.config = config
        self.metadata = dict(metadata)
        self.factors: dict[str, Factors] = {}
        self._paths: dict[str, str] = {}
        sides: dict[str, dict[str, Tensor]] = {}
        self.others: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise AdapterError(
                    f"{str(path)!r}: tensor {name!r} holds NaN or infinity, so that the model would answer nonsense: {DIVERGED}"
                )
            found = FACTOR.fullmatch(name)
            _check_name(path, name, found)
            if found and tensor.ndim == 2:
                sides.setdefault(found["path"], {})[found["side"]] = tensor
            elif "lora_magnitude_vector" in name or "lora_embedding" in name or found:
                raise AdapterError(
                    f"{str(path)!r}: tensor {name!r} belongs to a LoRA variant whose update is not s·B·A: it cannot be corrected"
                )
            else:
                self.others[name] = tensor
        for full, pair in sides.items():
            if len(pair) != 2:
                raise AdapterError(
                    f"{str(path)!r}: {full!r} has only one of lora_A and lora_B: the file is incomplete, save the adapter again"
                )
            module = strip_wrappers(full)
            self._paths[module] = full
            self.factors[module] = Factors(pair["B"], pair["A"], self._scaling(module, pair["A"].shape[0]))
        if stray := strays(config, self.factors):
            raise AdapterError(
                f"{str(path)!r}: has factors for {stray[0]!r}, which its target_modules do not name, so that loading it would leave them out: they are left "
                "over from another adapter on the same model object; train it again on a freshly loaded model"
            )
        if not self.factors:
            raise AdapterError(f"{str(path)!r}: holds no LoRA factors; give the folder of a trained LoRA adapter")

    @property
    def is_zero(self) -> bool:
        """Whether no layer has an update, so that loading the adapter changes nothing that a method acts on."""
        return all(factors.is_zero for factors in self.factors.values())

    @classmethod
    def open(cls, path: str | Path) -> AdapterFolder:
        """Read a folder with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            AdapterError: a file is missing, damaged or pickled, or the adapter is of a kind that the methods do not cover.
        """
        folder = Path(path)
        if not (folder / CONFIG).is_file():
            within = sorted(file.parent for file in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
            remedy = (
                f"name one of those within it: {', '.join(map(str, within))}"
                if within
                else "give the folder that PEFT's save_pretrained wrote"
            )
            raise AdapterError(f"adapter = {str(path)!r}: has no {CONFIG}; {remedy}")
        if not (folder / WEIGHTS).is_file():
            pickled = (
                " (adapter_model.bin is a pickle, which is never read; save the adapter as safetensors)"
                if (folder / "adapter_model.bin").is_file()
                else ""
            )
            raise AdapterError(f"adapter = {str(path)!r}: has no {WEIGHTS}{pickled}")
        config = read_config(folder / CONFIG)
        with _usable(folder / CONFIG):
            check_config(config)
        try:
            with safe_open(str(folder / WEIGHTS), framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
                metadata = handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{str(folder / WEIGHTS)!r} is truncated or not a safetensors file ({error}): save the adapter again"
            ) from error
        with _usable(folder / CONFIG):
            return cls(folder, config, tensors, metadata)

    def write(
        self,
        path: Path,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        config: Any,
        *,
        setting: str,
        report: Callable[[Path], Mapping[str, str]],
        replace: bool = False,
    ) -> None:
        """Write a copy with some factors replaced or added. The input stays as it is.

        Args:
            path: a new or empty folder.
            factors: module name → (B, A); they are cast to the dtype of the ones they replace. Modules that the adapter does not
                have are added.
            config: the LoraConfig to write.
            setting: how the user named the output, for messages.
            report: takes the folder with weights and configuration, and returns the texts of further files by name.
            replace: remove what is at `path` once the new folder is complete.

        Raises:
            AdapterError: the folder already exists or cannot be written to; nothing is left behind.
        """
        if path.resolve() == self.path.resolve():
            raise AdapterError(f"{setting} = {str(path)!r}: is the input, which is never overwritten; name another folder")
        tensors = dict(self.others)
        for module in {**self.factors, **factors}:
            old, full = self.factors.get(module), self._paths.get(module, f"{PEFT_PREFIX}{module}")
            B, A = factors[module] if module in factors or old is None else (old.B, old.A)
            tensors[f"{full}.lora_A.weight"] = (A.to(old.A.dtype) if old else A).contiguous()
            tensors[f"{full}.lora_B.weight"] = (B.to(old.B.dtype) if old else B).contiguous()
        with new_folder(path, error=AdapterError, setting=setting, replace=replace) as temporary:
            try:
                save_file(tensors, str(temporary / WEIGHTS), metadata=self.metadata or {"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            config.save_pretrained(str(temporary))
            for file in self.path.iterdir():
                if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED:
                    shutil.copyfile(file, temporary / file.name)
            for name, text in report(temporary).items():
                # A card may hold bytes that are no UTF-8.
                (temporary / name).write_text(text, encoding="utf-8", errors="surrogateescape")

    def _scaling(self, module: str, rank: int) -> float:
        """PEFT's scaling of a module; checks that the file's rank is the configuration's."""
        config = self.config
        expected = (config.rank_pattern or {}).get(get_pattern_key((config.rank_pattern or {}).keys(), module), config.r)
        if expected != rank:
            raise AdapterError(
                f"{str(self.path)!r}: layer {module!r} has rank {rank}, but its configuration says {expected}: the two files do not belong together"
            )
        alpha = (config.alpha_pattern or {}).get(get_pattern_key((config.alpha_pattern or {}).keys(), module), config.lora_alpha)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise AdapterError(
                f"{str(self.path / CONFIG)!r}: lora_alpha of layer {module!r} is {alpha!r}, which is not a number: set what it was trained with, or train it again"
            )
        # A layer of rank 0 has no update, whatever its scaling.
        return float(alpha / (rank**0.5 if config.use_rslora else rank)) if rank else 0.0


def _check_name(path: Path, name: str, factor: re.Match[str] | None) -> None:
    """Refuse a tensor that PEFT would leave out. PEFT's names are those of the model's own state, prefixed with `base_model.model.`"""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    # Beside its factors, an embedding that is itself adapted is saved from inside PEFT's wrapper.
    wrapped = set(parts) & (WRAPPERS if factor else WRAPPERS - {"base_layer"})
    if not name.startswith(PEFT_PREFIX) or wrapped:
        right = f"{PEFT_PREFIX}{strip_wrappers(name)}"
        raise AdapterError(
            f"{str(path)!r}: tensor {name!r} is not named as PEFT needs it, and PEFT would skip it with only a warning: save the adapter again from the "
            f"PeftModel itself (accelerator.unwrap_model(model).save_pretrained), or rename the tensors ({right!r})"
        )
    if factor is None and {"lora_A", "lora_B"} & set(parts) and not name.endswith(".lora_B.bias"):
        raise AdapterError(
            f"{str(path)!r}: tensor {name!r} is not named as PEFT needs it, which adds the adapter's name by itself: save the adapter with the PeftModel's own "
            "save_pretrained, or rename the tensors ('….lora_A.weight', '….lora_B.weight')"
        )


def read_config(path: Path) -> Any:
    """An adapter's `adapter_config.json` as PEFT reads it.

    Raises:
        AdapterError: it is damaged, is not LoRA's, or sets options that this PEFT does not know.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} is not valid JSON ({error}): save the adapter again") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise AdapterError(f"{str(path)!r}: peft_type = {kind!r}; only LoRA adapters have an update ΔW = s·B·A")
    known = set(LoraConfig.__dataclass_fields__)
    if strange := [key for key, value in raw.items() if key not in known and value]:
        wrote = raw.get("peft_version")
        remedy = (
            f"it was written by PEFT {wrote}: pip install peft=={wrote}"
            if isinstance(wrote, str) and is_newer(wrote, peft_version)
            else "the file names no newer PEFT, so another tool must have set it: load the adapter with that tool and save it as plain LoRA, or remove "
            "it from the file if it does not change the update s·B·A"
        )
        raise AdapterError(f"{str(path)!r}: sets {', '.join(strange)}, which PEFT {peft_version} does not know and would ignore; {remedy}")
    if not isinstance(raw.get("base_model_name_or_path"), str | None):
        raise AdapterError(
            f"{str(path)!r}: base_model_name_or_path = {raw['base_model_name_or_path']!r}: is not the name of a model; write its name, or null"
        )
    with _usable(path):
        config = LoraConfig.from_pretrained(str(path.parent))
        for option in ("rank_pattern", "alpha_pattern"):
            dict(getattr(config, option) or {})
        [int(index) for some in token_lists(config) for index in some]
    return config


def refuse_diverged(folder: Path) -> None:
    """Report an adapter that was just saved, of whatever kind, if it holds NaN or infinity.

    Raises:
        AdapterError: it does; the message names the first such tensor.
    """
    if not (folder / WEIGHTS).is_file():
        return
    with safe_open(str(folder / WEIGHTS), framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118  # no mapping
            if not is_finite(handle.get_tensor(name)):
                raise AdapterError(f"{str(folder)!r}: was saved, but its tensor {name!r} holds NaN or infinity: {DIVERGED}")


def token_lists(config: Any) -> list[list[int]]:
    """The tokens that a configuration trains besides LoRA, a list for every layer that has them."""
    indices = config.trainable_token_indices or []
    return list(indices.values()) if isinstance(indices, dict) else [indices]


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Name the file where options have other types than PEFT expects, or patterns are invalid."""
    try:
        yield
    except AdapterError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"{str(path)!r} is not a configuration that PEFT {peft_version} can use ({reason(error)}): save the adapter again"
        ) from error
