"""A model checkpoint as tensors by name: one safetensors file or shards, local or on the Hub, read one tensor at a time.

A model's parameters are asked for by the names that the model class gives them. Checkpoints on the Hub often use older names.
Transformers renames those tensors when it loads them, and splits or joins some; we do the same, with its own table.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trl_safety.adapters.architecture import UNREADABLE, Conversion, origins, skeleton
from trl_safety.adapters.names import strip_wrappers
from trl_safety.errors import CheckpointError, reason
from trl_safety.linalg.finite import is_finite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FULL_PRECISION = {"F64", "F32", "F16", "BF16"}
QUANT_STATE = "quant_state.bitsandbytes__"


class Checkpoint:
    """Read access to one checkpoint. Nothing is read until a tensor is asked for; the files are memory-mapped.

    Attributes:
        source: as the user named it.
        revision: the Hub commit that is read, or None for a folder.
        config: the checkpoint's `config.json`, empty if it has none.
    """

    def __init__(self, source: str | Path, revision: str | None = None, *, quantised: bool = False) -> None:
        """Open a checkpoint.

        Args:
            source: a local folder, or a Hub id.
            revision: branch, tag or commit on the Hub.
            quantised: whether to open a checkpoint that is stored quantised, too; see `weight`.

        Raises:
            CheckpointError: there is none, it is stored quantised, it is not safetensors, or a file is damaged.
        """
        self.source = str(source)
        self._folder = Path(source) if Path(source).is_dir() else None
        self._asked_revision = revision
        self.revision: str | None = None
        self._unreached: Exception | None = None
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        config = self._find("config.json")
        self.config: dict[str, Any] = _json(config) if config else {}
        if (method := self.config.get("quantization_config")) and not quantised:
            raise CheckpointError(
                f"{self.source!r} is stored quantised ({_quantisation(method)}): V = W_aligned − W_base would be rounding noise. "
                "Name the full-precision checkpoint that it was made from"
            )
        self._files = self._locate()

    def skeleton(self, *, trust_remote_code: bool = False) -> nn.Module | None:
        """The model's class without weights; see `architecture.skeleton`."""
        return skeleton(self.source, self.revision, self.config, trust_remote_code=trust_remote_code)

    @cached_property
    def _origins(self) -> dict[str, str | Conversion]:
        """Parameter → where it comes from; the stored names themselves where the model class is not known."""
        try:
            model = self.skeleton()
        except CheckpointError:
            model = None
        return origins(model, self._files) if hasattr(model, "base_model_prefix") else {name: name for name in self._files}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Every parameter, by its name in the model class → the name to ask `shape` and `tensor` for."""
        return {name: origin if isinstance(origin, str) else name for name, origin in self._origins.items()}

    @cached_property
    def modules(self) -> dict[str, str]:
        """Every module with a weight, by its name in the model class → the name to ask `shape` and `tensor` for."""
        return {strip_wrappers(name.removesuffix(".weight")): asked for name, asked in self.parameters.items() if name.endswith(".weight")}

    def read(self, module: str) -> Tensor:
        """The weight of a module: shape and dtype of the file, on the CPU.

        Raises:
            CheckpointError: it is quantised, is not a matrix, holds NaN or infinity, or its file is damaged.
        """
        name = self.modules[module]
        shape = self.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"layer {module!r} of {self.source!r} has shape {list(shape)}: only matrices are supported")
        return self.tensor(name)

    def weight(self, module: str) -> tuple[Tensor | None, bool]:
        """A module's weight, for recognising a model, and whether it was dequantised.

        Returns:
            The weight as `read` gives it; dequantised if bitsandbytes stored it in 4 bits; None if it is quantised in another way.

        Raises:
            CheckpointError: as `read`; or it is quantised by bitsandbytes, which is not installed.
        """
        name = self.modules[module]
        if name not in self._files:
            stored = self._conversion(name).stored
            return (self.read(module), False) if all(self._dtype(part) in FULL_PRECISION for _, part in stored) else (None, True)
        parts = {part.removeprefix(f"{name}."): part for part in self._files if part.startswith(f"{name}.")}
        # Checked before the dtype: with bnb_4bit_quant_storage the packed entries can be in a tensor of any dtype.
        if not any(QUANT_STATE in part for part in parts):
            return (self.read(module), False) if self._dtype(name) in FULL_PRECISION else (None, True)
        try:
            from bitsandbytes.functional import QuantState, dequantize_4bit
        except ImportError as error:
            raise CheckpointError(
                f"{self.source!r} is stored in 4 bits, which cannot be read without bitsandbytes ({reason(error)}): pip install 'trl-safety[qlora]'"
            ) from error
        try:
            state = {part: self._open(self._files[stored]).get_tensor(stored) for part, stored in parts.items()}
            packed = self._open(self._files[name]).get_tensor(name)
            weight: Tensor = dequantize_4bit(packed, QuantState.from_dict(state, torch.device("cpu")))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged(self._files[name], error) from error
        return self._finite(name, weight), True

    @property
    def names(self) -> list[str]:
        """All tensors' names, as stored."""
        return list(self._files)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a stored tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it; `name` as in `names`, `parameters` or `modules`."""
        if name not in self._files:
            return tuple(self._conversion(name).model.state_dict()[name].shape)
        try:
            return tuple(self._open(self._files[name]).get_slice(name).get_shape())
        except SafetensorError as error:
            raise self._damaged(self._files[name], error) from error

    def tensor(self, name: str) -> Tensor:
        """Any tensor, `name` as in `names`, `parameters` or `modules`; see `read`."""
        if name in self._files:
            return self._stored(name)
        conversion = self._conversion(name)
        try:
            return conversion.compute(self._stored)[name].contiguous()
        except UNREADABLE as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"layer {name!r} of {self.source!r} cannot be computed from {conversion.stored[0][1]!r} as in Transformers ({reason(error)}): fetch or save the "
                "checkpoint again"
            ) from error

    def _stored(self, name: str) -> Tensor:
        file = self._files[name]
        # Reopened for each tensor: what was read through one mapping counts as this process's memory until the mapping is gone.
        handle = self._map(file)
        try:
            dtype = handle.get_slice(name).get_dtype()
            if dtype not in FULL_PRECISION:
                raise CheckpointError(
                    f"layer {name!r} of {self.source!r} is stored as {dtype}, which is quantised: name the full-precision checkpoint"
                )
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(self._files[name], error) from error
        return self._finite(name, tensor)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise CheckpointError(
                f"layer {name!r} of {self.source!r} holds NaN or infinity: the checkpoint is broken, fetch or save it again"
            )
        return tensor

    def _conversion(self, name: str) -> Conversion:
        found = self._origins[name]
        assert isinstance(found, Conversion)  # noqa: S101  # what is not stored is computed
        return found

    def _dtype(self, name: str) -> str:
        try:
            dtype: str = self._open(self._files[name]).get_slice(name).get_dtype()
        except SafetensorError as error:
            raise self._damaged(self._files[name], error) from error
        return dtype

    def _locate(self) -> dict[str, str]:
        """Tensor name → file name. If there are both a single file and shards, the single file is used, as in Transformers."""
        own = self.config.get("transformers_weights")
        for file in [own] if isinstance(own, str) else [SINGLE, INDEX]:
            found = self._find(file)
            if found is None:
                continue
            if found.suffix != ".json":
                return dict.fromkeys(self._open(file).keys(), file)
            files = _json(found).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(part, str) for part in files.values()):
                raise CheckpointError(
                    f"{str(found)!r} has no weight_map that names a file for every tensor: fetch or save the checkpoint again"
                )
            return files
        if self._unreached is not None:
            raise self._unreachable(self._unreached)
        pickled = self._folder and [path.name for path in self._folder.glob("*.bin")]
        hint = (
            f"its weights are pickled ({pickled[0]}), which is never read; load and save it with Transformers to get safetensors"
            if pickled
            else f"it has neither {SINGLE} nor {INDEX}; give the folder or Hub id of a Transformers model saved as safetensors"
        )
        raise CheckpointError(f"{self.source!r} cannot be read as a checkpoint: {hint}")

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            self._handles[file] = self._map(file)
        return self._handles[file]

    def _map(self, file: str) -> Any:
        path = self.path_of(file)
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from error

    def path_of(self, file: str) -> Path:
        """The path of one of the checkpoint's files, which is fetched from the Hub on first use.

        Raises:
            CheckpointError: it is not there.
        """
        if file not in self._paths:
            path = self._find(file)
            if path is None:
                raise CheckpointError(f"{self.source!r} lacks the file {file!r} that its index names: fetch the checkpoint again")
            self._paths[file] = path
        return self._paths[file]

    def _find(self, file: str) -> Path | None:
        """One of the checkpoint's files, or None if it has none of this name."""
        if self._folder is not None:
            path = self._folder / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(self.source, file, revision=self._asked_revision))
        except LocalEntryNotFoundError as error:
            # Without a network, a model is what the cache holds of it, even if that is only the note that a file does not exist.
            if not self._cached():
                raise self._unreachable(error) from error
            self._unreached = error
            return None
        except EntryNotFoundError:
            return None
        except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            raise self._unreachable(error) from error
        if path.parent.parent.name == "snapshots":
            self.revision = path.parent.name
        return path

    def _cached(self) -> bool:
        """Whether the Hub's cache holds anything of this model at this revision."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            snapshot_download(self.source, revision=self._asked_revision, local_files_only=True, allow_patterns=[])
        except (HFValidationError, OSError, ValueError):
            return False
        return True

    def _unreachable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.source!r} is not a local folder and could not be fetched from the Hub ({reason(error)}): check the path or id, the "
            "revision, the network and your access"
        )

    def _damaged(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{file!r} of {self.source!r} is truncated or not a safetensors file ({error}): fetch or save it again")


def digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and bytes, the first 32 hexadecimal digits."""
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    state = hashlib.sha256(header)
    state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()[:32]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}): fetch or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(content).__name__} where an object is expected: fetch or save the checkpoint again"
        )
    return content


def _quantisation(config: Any) -> str:
    return str(config.get("quant_method", "unknown method")) if isinstance(config, dict) else "unknown method"


def why_no_bitsandbytes() -> str | None:
    """Why bitsandbytes, which reads and makes 4-bit weights, cannot be used here; None if it can."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return reason(error)
    return None
