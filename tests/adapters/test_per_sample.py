"""Per-sample LoRA gradients of one batched backward against a loop of single-sample passes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests import tiny
from trl_safety.adapters.documents import Place, Rows, Stretches
from trl_safety.adapters.lora import lora_modules
from trl_safety.adapters.per_sample import Collect, Dots, FlatFactors, Total, per_sample_gradients
from trl_safety.errors import AdapterError

SAMPLES, LENGTH = 5, 11


def peft_model(dtype: torch.dtype = torch.float64, base: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base if base is not None else tiny.model(dtype=dtype), tiny.lora(**options))
    if base is None:
        model.to(dtype)
    for module in lora_modules(model):
        torch.nn.init.normal_(module.B, std=0.05)
    return model.train()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (SAMPLES, LENGTH))
    mask = torch.ones_like(ids)
    for row, length in enumerate((11, 7, 9, 4, 10)):
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def losses(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits[:, :-1]
    labels = inputs["input_ids"][:, 1:]
    values = torch.nn.functional.cross_entropy(logits.mT.double(), labels, reduction="none") * inputs["attention_mask"][:, 1:]
    return values.sum(1) / inputs["attention_mask"][:, 1:].sum(1)


def one_by_one(model: Any, flat: FlatFactors) -> Tensor:
    rows = []
    for index in range(SAMPLES):
        model.zero_grad()
        losses(model, {key: value[index : index + 1] for key, value in batch().items()}).sum().backward()
        rows.append(torch.cat([linear.weight.grad.flatten().double() for _, linear, _ in flat.factors]))
    model.zero_grad()
    return torch.stack(rows)


def together(model: Any, flat: FlatFactors) -> Tensor:
    collected = Collect(flat, SAMPLES)
    with per_sample_gradients(flat, Rows(SAMPLES), collected):
        losses(model, batch()).sum().backward()
    assert all(linear.weight.grad is None for _, linear, _ in flat.factors)
    assert not any("forward" in vars(linear) for _, linear, _ in flat.factors)
    return collected.matrix.double()


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": "all-linear"}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}],
    ids=["three", "all-linear", "rslora", "rank_pattern"],
)
def test_equal_a_loop_in_float64(options: dict[str, Any]) -> None:
    model = peft_model(**options)
    flat = FlatFactors(lora_modules(model))
    close(together(model, flat), one_by_one(model, flat), 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = peft_model()
    expected = one_by_one(model, flat := FlatFactors(lora_modules(model)))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    close(together(model, flat), expected, 1e-12)


def test_checkpointing_still_saves_memory() -> None:
    """The recorder takes its activations from the tensors that autograd saves, which checkpointing drops."""

    def saved(checkpointing: bool) -> int:
        model = peft_model()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        flat, count = FlatFactors(lora_modules(model)), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with per_sample_gradients(flat, Rows(SAMPLES), Collect(flat, SAMPLES)):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = losses(model, batch()).sum()
            loss.backward()
        return count

    assert saved(checkpointing=True) < 0.5 * saved(checkpointing=False)


def test_bf16_autocast_is_as_near_as_the_plain_backward() -> None:
    model = peft_model(torch.float32)
    flat = FlatFactors(lora_modules(model))
    expected = one_by_one(model, flat)
    with torch.autocast("cpu", torch.bfloat16):
        ours = together(model, flat)
        loop = one_by_one(model, flat)
    close(ours, expected, 2 * ((loop - expected).norm() / expected.norm()).item() + 1e-3)


def test_dropout_gives_the_gradient_of_the_mask_drawn() -> None:
    model = peft_model(lora_dropout=0.5)
    flat = FlatFactors(lora_modules(model))
    torch.manual_seed(5)
    losses(model, batch()).sum().backward()
    plain = torch.cat([linear.weight.grad.flatten() for _, linear, _ in flat.factors])
    model.zero_grad()
    torch.manual_seed(5)
    close(together(model, flat).sum(0), plain, 1e-12)


def test_four_bit_layers() -> None:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        base = LlamaForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        )
    model = peft_model(base=base)
    flat = FlatFactors(lora_modules(model))
    close(together(model, flat), one_by_one(model, flat), 1e-4)


def test_streams_agree_with_the_matrix() -> None:
    model = peft_model()
    flat = FlatFactors(lora_modules(model))
    matrix, direction = one_by_one(model, flat), torch.randn(FlatFactors(lora_modules(model)).size, dtype=torch.float64)
    dots, total = Dots(direction, SAMPLES), Total(flat)
    for consumer in (dots, total):
        with per_sample_gradients(flat, Rows(SAMPLES), consumer):
            losses(model, batch()).sum().backward()
    torch.testing.assert_close(dots.dots, matrix @ direction)
    torch.testing.assert_close(dots.squares, matrix.square().sum(1))
    torch.testing.assert_close(total.vector, matrix.sum(0))


@pytest.mark.parametrize("how", ["bypassed", "flattened"])
def test_what_cannot_be_told_apart_is_an_error(how: str) -> None:
    model = peft_model()
    flat = FlatFactors(lora_modules(model))
    samples, match = (SAMPLES, "got no gradient") if how == "bypassed" else (SAMPLES + 1, "cannot be told apart")
    context = model.disable_adapter() if how == "bypassed" else nullcontext()
    with pytest.raises(AdapterError, match=match), per_sample_gradients(flat, Rows(samples), Collect(flat, samples)):  # noqa: PT012  # the error comes on leaving
        with context:
            value = losses(model, batch()).sum()
        if value.requires_grad:
            value.backward()
    assert not any("forward" in vars(linear) for _, linear, _ in flat.factors)


def test_gradients_are_added_to_what_is_there() -> None:
    model = peft_model()
    flat = FlatFactors(lora_modules(model))
    vector = torch.randn(flat.size, dtype=torch.float64)
    flat.add_to_gradients(vector)
    flat.add_to_gradients(vector)
    assert torch.equal(torch.cat([linear.weight.grad.flatten() for _, linear, _ in flat.factors]), 2 * vector)


LENGTHS = (11, 7, 1, 9, 4, 10, 2)
LAYOUTS = {
    "one row": [[0, 1, 2, 3, 4, 5, 6]],
    "two rows": [[3, 0, 2], [6, 5, 4, 1]],
    "a row each": [[0], [1], [2], [3], [4], [5], [6]],
}


def packed(layout: list[list[int]]) -> tuple[dict[str, Tensor], Tensor, Stretches, list[Tensor]]:
    """Inputs and labels of documents that share rows, some padded, where they lie, and each document's tokens."""
    torch.manual_seed(2)
    documents = [torch.randint(3, 64, (length,)) for length in LENGTHS]
    width = max(sum(LENGTHS[number] for number in row) for row in layout) + 3
    ids, positions = torch.zeros(len(layout), width, dtype=torch.long), torch.zeros(len(layout), width, dtype=torch.long)
    labels, places = torch.full_like(ids, -100), {}
    for row, numbers in enumerate(layout):
        start = 0
        for number in numbers:
            stretch = slice(start, start + LENGTHS[number])
            ids[row, stretch], positions[row, stretch] = documents[number], torch.arange(LENGTHS[number])
            labels[row, stretch] = documents[number]
            labels[row, start] = -100
            places[number] = Place(row, start, LENGTHS[number])
            start = stretch.stop
        positions[row, start:] = torch.arange(width - start)
    return (
        {"input_ids": ids, "position_ids": positions},
        labels,
        Stretches([places[i] for i in range(len(places))], tuple(ids.shape)),
        documents,
    )


def packed_gradients(model: Any, flat: FlatFactors, layout: list[list[int]], **further: Any) -> Tensor:
    inputs, labels, documents, _ = packed(layout)
    collected = Collect(flat, documents.count)
    with per_sample_gradients(flat, documents, collected):
        logits = model(**inputs, **further, use_cache=False).logits[:, :-1]
        values = torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
        values.sum().backward()
    return collected.matrix


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_a_loop_of_single_documents_in_float64(layout: str, checkpointing: bool | None) -> None:
    model = peft_model(target_modules="all-linear")
    flat = FlatFactors(lora_modules(model))
    expected = []
    for ids in packed(LAYOUTS[layout])[-1]:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        loss.backward()
        expected.append(torch.cat([linear.weight.grad.flatten() for _, linear, _ in flat.factors]))
    model.zero_grad()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    close(packed_gradients(model, flat, LAYOUTS[layout]), torch.stack(expected), 1e-12)
    assert not expected[2].any(), "a document of one token has nothing to predict"
    if layout != "a row each" and checkpointing is None:
        # With a mask of ones the documents see each other, and the gradients are no longer theirs.
        mixed = packed_gradients(model, flat, LAYOUTS[layout], attention_mask=torch.ones_like(packed(LAYOUTS[layout])[0]["input_ids"]))
        assert (mixed - torch.stack(expected)).norm() > 1e-2 * torch.stack(expected).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stretches_sum_over_their_own_tokens(layout: str) -> None:
    _, _, documents, _ = packed(LAYOUTS[layout])
    shape = (len(LAYOUTS[layout]), documents._shape[1])
    values, left, right = torch.randn(shape), torch.randn(*shape, 3), torch.randn(*shape, 5)
    slices = [(place.row, slice(place.start, place.start + place.length)) for place in documents.places]
    torch.testing.assert_close(documents.sums(values), torch.stack([values[stretch].sum() for stretch in slices]))
    torch.testing.assert_close(documents.products(left, right), torch.stack([left[stretch].T @ right[stretch] for stretch in slices]))
    (groups,) = documents._groups.values()
    assert sum(group.tokens.numel() for group in groups) < 2 * sum(LENGTHS), "less than twice the documents' tokens are multiplied"
    assert len(groups) <= max(LENGTHS).bit_length()
