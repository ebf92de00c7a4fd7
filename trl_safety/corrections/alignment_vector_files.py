"""The alignment vector as a separate adapter, and on whole checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.files import new_folder
from trl_safety.adapters.fingerprint import same_up_to_rounding, sample
from trl_safety.adapters.folder import COPIED_SUFFIXES, PEFT_PREFIX, WEIGHTS
from trl_safety.adapters.marks import update_config
from trl_safety.adapters.names import strip_wrappers
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.options import validate
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.errors import CheckpointError, ConfigurationError
from trl_safety.methods import alignment_vector
from trl_safety.subspace.artifact import AlignmentSubspace

VOCABULARY = ("embed", "lm_head", "wte")
"""Parts of the names of tensors with a row for every token."""


def write_alignment_adapter(subspace: AlignmentSubspace, output: str | Path, *, gamma: float = 1.0, rank: int | None = None) -> None:
    """Write γ·V_k as a separate LoRA adapter, to be used together with a user's: `load_adapter`, then activate both.

    Args:
        subspace: with a rank.
        output: a new or empty folder.
        gamma: γ, above 0.
        rank: k, how many of the subspace's directions; all by default.

    Raises:
        SubspaceError: the subspace keeps V whole or has too few directions.
        ConfigurationError: γ is not above 0.
    """
    if gamma <= 0:
        raise ConfigurationError(f"gamma = {gamma:g}: the adapter would do nothing, or remove alignment; use 1, for example")
    config = validate(AlignmentVectorConfig, {"gamma": gamma, "rank": rank}, "alignment_vector")
    AlignmentVectorCorrection(config).check(subspace.layers)
    ranks = {name: rank or layer.rank for name, layer in subspace.layers.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=set(ranks),
        fan_in_fan_out=any(layer.transposed for layer in subspace.layers.values()),
        base_model_name_or_path=subspace.provenance.aligned,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    if len(set(ranks.values())) > 1:
        update_config(lora, None, ranks, {name: (k, 1.0) for name, k in ranks.items()})
    tensors = {}
    for name, layer in subspace.layers.items():
        left, values, right = (t.float() for t in layer.factors())
        empty = torch.zeros(layer.shape[0], 0), torch.zeros(0, layer.shape[1])
        k = ranks[name]
        B, A = alignment_vector.add(*empty, left[:, :k], values[:k], right[:, :k], gamma=gamma, kappa=1.0, scaling=1.0)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = A.contiguous(), B.contiguous()
    with new_folder(Path(output), error=ConfigurationError, setting="output") as folder:
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        lora.save_pretrained(str(folder))


def add_vector(
    model: str | Path, base: str | Path, aligned: str | Path, output: str | Path, *, gamma: float = 1.0, kappa: float = 1.0
) -> list[str]:
    """W ← W_aligned + κ·(W − W_aligned) + γ·(W_aligned − W_base) on a whole checkpoint, file by file; V is not cut.

    RESTA (arXiv 2402.11746) as published, for a model that an adapter was merged into or that was fully fine-tuned. If the
    vocabularies differ, only the rows that all three have are changed.

    Args:
        model: the fine-tuned model: folder or Hub id, full precision, safetensors.
        base: the unaligned model.
        aligned: the aligned model that was fine-tuned.
        output: a new or empty folder, which also gets the model's other files.
        gamma: γ.
        kappa: κ.

    Returns:
        Names of the tensors that the base or the aligned model lacks; these stay as they are.

    Raises:
        CheckpointError: one of the three cannot be read, is quantised or has another architecture; or no tensor is in all of them.
        ConfigurationError: nothing would change, alignment would be removed, or the output cannot be written.
    """
    if gamma == 0 and kappa == 1:
        raise ConfigurationError("gamma = 0 and kappa = 1: the model would stay as it is; set one of them")
    source, pair = Checkpoint(model), (Checkpoint(base), Checkpoint(aligned))
    stored = [{strip_wrappers(name): name for name in checkpoint.names} for checkpoint in pair]
    if gamma < 0:
        raise ConfigurationError(f"gamma = {gamma:g}: would remove alignment from the model; use 1, for example")
    missing, differs = [], False
    to_base = to_aligned = 0.0
    files: dict[str, list[str]] = {}
    for name in source.names:
        files.setdefault(source.file_of(name), []).append(name)
    with new_folder(Path(output), error=ConfigurationError, setting="output") as folder:
        for file, names in files.items():
            tensors = {}
            for name in names:
                weight = source.tensor(name)
                places = [known.get(strip_wrappers(name)) for known in stored]
                if places[0] is None or places[1] is None:
                    missing.append(name)
                    tensors[name] = weight
                    continue
                unaligned, before = (checkpoint.tensor(place) for checkpoint, place in zip(pair, places, strict=True) if place)
                differs |= unaligned.shape != before.shape or not same_up_to_rounding(unaligned, before)
                if weight.shape == unaligned.shape == before.shape:
                    entries, *others = (sample(tensor).double() for tensor in (weight, unaligned, before))
                    to_base, to_aligned = (
                        total + float((entries - other).square().sum()) for total, other in zip((to_base, to_aligned), others, strict=True)
                    )
                tensors[name] = _added(name, weight, unaligned, before, gamma, kappa)
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
        if len(missing) == len(source.names):
            raise CheckpointError(f"none of {str(model)!r}'s tensors is in both {str(base)!r} and {str(aligned)!r}: name this model's pair")
        if not differs:
            raise CheckpointError(
                f"base = {str(base)!r} and aligned = {str(aligned)!r} do not differ by more than rounding: V would be zero"
            )
        if to_base < to_aligned:
            raise CheckpointError(
                f"base = {str(base)!r} is closer to the model than aligned = {str(aligned)!r}, so alignment would be removed: check that base and aligned are "
                "not swapped"
            )
        local = Path(model)
        for path in local.iterdir() if local.is_dir() else ():
            if path.is_file() and path.suffix in COPIED_SUFFIXES:
                shutil.copyfile(path, folder / path.name)
        if not local.is_dir():
            _copy_from_hub(str(model), folder)
    return missing


def _added(name: str, weight: Tensor, base: Tensor, aligned: Tensor, gamma: float, kappa: float) -> Tensor:
    if weight.shape[1:] != aligned.shape[1:] or weight.shape[1:] != base.shape[1:] or weight.ndim == 0:
        raise CheckpointError(
            f"tensor {name!r} is {list(weight.shape)} in the model, {list(aligned.shape)} in the aligned and {list(base.shape)} in the base model: name this "
            "model's pair"
        )
    rows = min(len(weight), len(aligned), len(base))
    if not len(weight) == len(aligned) == len(base) and not any(part in name for part in VOCABULARY):
        raise CheckpointError(
            f"tensor {name!r} has {len(weight)} rows in the model, {len(aligned)} in the aligned and {len(base)} in the base model: name this model's pair"
        )
    result = weight.clone()
    one, before, unaligned = (tensor[:rows].float() for tensor in (weight, aligned, base))
    result[:rows] = (before + kappa * (one - before) + gamma * (before - unaligned)).to(weight.dtype)
    return result


def _copy_from_hub(source: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in COPIED_SUFFIXES]
    for path in Path(snapshot_download(source, allow_patterns=patterns)).iterdir():
        if path.is_file() and path.suffix in COPIED_SUFFIXES:
            shutil.copyfile(path, folder / path.name)
