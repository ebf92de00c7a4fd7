"""Buffer-and-Reinforce's diagnostic: whether training on a data set moves each layer with or against a safety direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from trl_safety.adapters.architecture import UNREADABLE
from trl_safety.adapters.files import replacing
from trl_safety.adapters.folder import CONFIG, AdapterFolder, Factors
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.record import open_kind
from trl_safety.errors import ConfigurationError, SafetyError, reason
from trl_safety.inspection.layers import common_prefix
from trl_safety.linalg.alignment import slope_score
from trl_safety.linalg.low_rank import product_norm_squared
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.data import IGNORED, load_rows, supervised


class LayerScore(BaseModel):
    """One layer: ‖v‖_F, and the score without and with the buffer (None if none was given)."""

    layer: str
    direction_norm: float
    score: float
    buffered: float | None = None


class SafetyGradient(BaseModel):
    """The scores of all layers for one model, data set and safety direction."""

    model: str
    data: str
    direction: str
    buffer: str | None
    samples: int
    loss: float
    buffered_loss: float | None = None
    layers: list[LayerScore]


def safety_gradient(
    model: str | Path,
    data: str,
    direction: str | Path,
    *,
    buffer: str | Path | None = None,
    samples: int = 64,
    batch_size: int = 8,
    max_length: int = 512,
    load_in_4bit: bool = False,
    device: str | torch.device | None = None,
) -> SafetyGradient:
    """The safety gradient score S = mean over samples of −⟨g, v⟩ / ‖v‖_F of every layer (arXiv 2605.24550, Section 3).

    g is the gradient of a sample's mean loss with respect to the layer's weight, and v a safety direction. If S is negative, a
    training step on the data moves the layer against v. The paper writes g·v and leaves the sign open; S uses the movement −g, as
    its figures do. Nothing of the weight's size is formed: the slope along v is the gradient with respect to one scalar per layer.

    Args:
        model: the aligned model, a folder or a Hub id.
        data: a source that `load_rows` reads, of rows that `supervised` reads.
        direction: v, a LoRA adapter trained for safety (for example a ReinforceLoRA) or an alignment subspace with a rank.
        buffer: a BufferLoRA, to add the scores with it attached.
        samples: number of rows to use, from the first.
        batch_size: rows per batch.
        max_length: maximum tokens per row.
        load_in_4bit: load the model in NF4.
        device: where to compute; by default a GPU if there is one.

    Raises:
        ConfigurationError: the data cannot be read or has no answer.
        AdapterError: an adapter is missing or belongs to another model.
        SubspaceError: the subspace keeps V whole.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    rows = load_rows(data, "data")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"dtype": torch.bfloat16} if where.type == "cuda" else {}
    if load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options.get("dtype", torch.float32)
        )
        options |= {"quantization_config": config, "device_map": {"": str(where)}}
    try:
        net = AutoModelForCausalLM.from_pretrained(str(model), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except UNREADABLE as error:
        raise ConfigurationError(f"model = {str(model)!r}: cannot be loaded ({reason(error)}); give a folder or a Hub id") from error
    net = net if load_in_4bit else net.to(where)
    net.eval().requires_grad_(False)
    tokens = [supervised(row, tokenizer, max_length) for row in rows.select(range(min(samples, len(rows))))]
    if not all(any(label != IGNORED for label in labels) for _, labels in tokens):
        raise ConfigurationError(f"data = {data!r}: a row has no answer within max_length = {max_length}: raise it, or remove the row")
    factors = _direction(direction)
    frozen = FrozenAdapter(net, factors, f"direction = {str(direction)!r}")
    norms = torch.stack([f.scaling * product_norm_squared(f.B.double(), f.A.double()).clamp(min=0).sqrt() for f in factors.values()])
    jailbreak = None
    if buffer is not None:
        folder, record = open_kind(buffer, "buffer", "buffer")
        jailbreak = FrozenAdapter(net, folder.factors, f"buffer = {str(buffer)!r}")
        record.check_layers(jailbreak.layers, f"buffer = {str(buffer)!r}")
    runs = []
    for beside in (None, jailbreak) if jailbreak else (None,):
        with beside.attached() if beside else nullcontext():
            runs.append(_slopes(net, frozen, list(factors), tokens, batch_size, tokenizer.pad_token_id or 0))
    scores = [slope_score(slopes, norms).tolist() for slopes, _ in runs]
    return SafetyGradient(
        model=str(model),
        data=data,
        direction=str(direction),
        buffer=str(buffer) if buffer else None,
        samples=len(tokens),
        loss=runs[0][1],
        buffered_loss=runs[1][1] if jailbreak else None,
        layers=[
            LayerScore(layer=name, direction_norm=norm, score=scores[0][i], buffered=scores[1][i] if jailbreak else None)
            for i, (name, norm) in enumerate(zip(factors, norms.tolist(), strict=True))
        ],
    )


def _direction(source: str | Path) -> Mapping[str, Factors]:
    if (Path(source) / CONFIG).is_file():
        return AdapterFolder.open(source).factors
    if not Path(source).exists() and (len(Path(source).parts) != 2 or Path(source).suffix):
        raise ConfigurationError(f"direction = {str(source)!r}: is neither an adapter folder nor a subspace file nor a Hub id")
    subspace = AlignmentSubspace.from_pretrained(source)
    triples = {name: layer.factors() for name, layer in subspace.layers.items()}
    return {name: Factors(left * values, right.mT, 1.0) for name, (left, values, right) in triples.items()}


def _slopes(
    model: Any, frozen: FrozenAdapter, names: Sequence[str], tokens: Sequence[tuple[list[int], list[int]]], batch_size: int, pad: int
) -> tuple[Tensor, float]:
    """⟨∇L, v⟩ of every layer, (layers,) float64, and L, the mean over samples of their mean losses."""
    device = next(model.parameters()).device
    gates = {name: torch.zeros((), device=device, requires_grad=True) for name in names}
    total = torch.zeros((), device=device, dtype=torch.float64)
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch], device=device)
        labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in batch], device=device)
        with frozen.attached(gates):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)
        loss = (losses / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)).sum() / len(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    frozen.check_fired()
    slopes = torch.stack([gate.grad if gate.grad is not None else torch.zeros_like(gate) for gate in gates.values()])
    return slopes.double().cpu(), float(total)


def plot(view: SafetyGradient, path: Path) -> None:
    """Draw the scores by layer as PNG. Raises `SafetyError` if it cannot be written."""
    from matplotlib.figure import Figure

    layers = view.layers
    figure = Figure(figsize=(8, max(4.0, 0.18 * len(layers) + 1.5)), layout="constrained")
    axis = figure.subplots()
    positions = list(range(len(layers)))
    axis.barh([p - 0.2 for p in positions], [layer.score for layer in layers], height=0.4, color="#b5483a", label="aligned model")
    if view.buffer:
        axis.barh(
            [p + 0.2 for p in positions], [layer.buffered or 0.0 for layer in layers], height=0.4, color="#44617b", label="with the buffer"
        )
    shared = common_prefix([layer.layer for layer in layers])
    axis.set(xlabel="safety gradient score (negative: training moves the layer against the direction)", yticks=positions)
    axis.set_yticklabels([layer.layer.removeprefix(shared) for layer in layers], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.legend(fontsize=7)
    with replacing(path, error=SafetyError, setting="plot") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
