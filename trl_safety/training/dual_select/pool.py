"""DualSelect's pool of references: the loss of each row, and the mean gradient of some of them. Each process computes a share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_safety.adapters.documents import Rows
from trl_safety.adapters.lora import unwrap
from trl_safety.adapters.per_sample import Dots, FlatFactors, Total, per_sample_gradients
from trl_safety.errors import ConfigurationError
from trl_safety.training.dual_select.losses import Forward, mean_kl, sample_losses
from trl_safety.training.facts import rows_of


class ReferencePool:
    """Tokenised references, evaluated with a trainer's model.

    Args:
        trainer: its model and collator are used.
        flat: the factors whose gradients are computed.
        rows: what the model takes, and labels.
        lengths: the number of tokens in each row.
        kl: whether the rows are prompts without answers, held to the starting model by KL.

    Attributes:
        fused: whether the trainer's forward keeps the head's logits to itself, which its first forward shows.
    """

    def __init__(self, trainer: Any, flat: FlatFactors, rows: Dataset, lengths: Sequence[int], *, kl: bool) -> None:
        self._trainer, self._flat, self.rows, self._lengths, self.kl = trainer, flat, rows, lengths, kl
        self.fused = False
        self._plain = rows_of(trainer).value == "plain"

    def __len__(self) -> int:
        return len(self.rows)

    def scored(self, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each row its loss, its gradient's inner product with `direction`, and its gradient's squared norm, (n,) each, float64."""
        trainer = self._trainer
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        size = trainer.args.per_device_train_batch_size
        # Sorted by length, to keep padding down.
        mine = sorted(range(len(self)), key=lambda index: (self._lengths[index], index))[rank::world]
        table = self._flat.like.new_zeros(len(self), 3, dtype=torch.float64)
        for start in range(0, len(mine), size):
            indices = mine[start : start + size]
            scored = Dots(direction, len(indices))
            with per_sample_gradients(self._flat, Rows(len(indices)), scored):
                losses = self.losses(indices)
                with torch.autocast(losses.device.type, enabled=False):
                    torch.autograd.backward(losses.sum())
            table[indices] = torch.stack([losses.detach().double().to(table.device), scored.dots.double(), scored.squares.double()], dim=1)
        if world > 1:
            table = trainer.accelerator.reduce(table, reduction="sum")
        losses, dots, squares = table.unbind(1)
        return losses, dots, squares

    def mean_gradient(self, indices: Sequence[int], weights: Sequence[float]) -> Tensor:
        """Σ wⱼ gⱼ / Σ wⱼ at the current parameters, (P,)."""
        trainer = self._trainer
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        total = self._flat.zeros()
        mine = list(zip(indices, weights, strict=True))[rank::world]
        size = trainer.args.per_device_train_batch_size
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            summed = Total(self._flat)
            with per_sample_gradients(self._flat, Rows(len(part)), summed):
                losses = self.losses([index for index, _ in part])
                with torch.autocast(losses.device.type, enabled=False):
                    torch.autograd.backward((losses * torch.tensor([weight for _, weight in part]).to(losses)).sum())
            total += summed.vector
        if world > 1:
            total = trainer.accelerator.reduce(total, reduction="sum")
        return total / sum(weights)

    def losses(self, indices: Sequence[int]) -> Tensor:
        """(n,) losses of references: the mean NLL of the answer's tokens, or the mean KL(starting model ‖ current) over the prompt's tokens.

        It calls the model directly, so that the trainer's own metrics count the user's data alone.
        """
        trainer = self._trainer
        collate = trainer.data_collator if self._plain else _padded
        inputs = trainer._prepare_inputs(collate([self.rows[index] for index in indices]))
        labels = inputs.pop("labels")
        inputs["use_cache"] = False
        model: Any = unwrap(trainer.model)
        with trainer.compute_loss_context_manager():
            if self.kl:
                logits = model(**inputs).logits
                with torch.no_grad(), self._starting_model():
                    aligned = model(**inputs).logits
                mask = inputs["attention_mask"].to(torch.bool)
                return mean_kl(aligned, logits, mask)
            if self.fused:
                return sample_losses(
                    Forward(model, model(**inputs, labels=labels, fused_lm_head=True)), labels, dft=False, grad=True
                ).losses
            return sample_losses(Forward(model, model(**inputs)), labels, dft=False, grad=True).losses

    def _starting_model(self) -> Any:
        """Context in which the adapter is switched off."""
        model: Any = unwrap(self._trainer.model)
        if not hasattr(model, "disable_adapter"):
            raise ConfigurationError(
                f"{type(model).__name__} has no disable_adapter, which references without an answer need: give the trainer a PeftModel or peft_config, or "
                "references with answers"
            )
        return model.disable_adapter()


def _padded(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One reference a row, where the trainer's own collator would put several into one."""

    def column(name: str, padding: int) -> Tensor:
        return pad_sequence([torch.tensor(example[name]) for example in examples], batch_first=True, padding_value=padding)

    ids = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": pad_sequence(ids, batch_first=True)}
