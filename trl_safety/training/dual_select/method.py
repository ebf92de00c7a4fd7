"""DualSelect in training: the choice in every batch, the gradients, and what a checkpoint keeps.

Above 450 lines, since these three share one state; the pool and the losses have files of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_safety.adapters.documents import Documents, Stretches
from trl_safety.adapters.engine import is_deepspeed
from trl_safety.adapters.files import replacing, sha256
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.lora import DIVERGED, adapter_name, unwrap
from trl_safety.adapters.per_sample import Collect, FlatFactors, per_sample_gradients
from trl_safety.config.block import SafetyConfig
from trl_safety.config.dual_select import DualSelectConfig
from trl_safety.errors import ConfigurationError, reason
from trl_safety.linalg.finite import is_finite
from trl_safety.methods import dual_select
from trl_safety.reports.selection import MOST_TEXTS, Choice, SelectionLog, most_dropped, read_choices, write_texts
from trl_safety.reports.source import adapter_folder
from trl_safety.training.compat import trainer_divides_loss
from trl_safety.training.documents import LENGTHS, ROW, number_rows, take_documents, texts, used_columns
from trl_safety.training.dual_select.isolation import refuse_mixed_documents
from trl_safety.training.dual_select.losses import Batch, Forward, sample_losses, watched
from trl_safety.training.dual_select.pool import ReferencePool
from trl_safety.training.dual_select.samples import Samples
from trl_safety.training.engines import through_deepspeed
from trl_safety.training.facts import rows_of
from trl_safety.training.method import Context, Inner, TrainingMethod
from trl_safety.training.references import References

logger = logging.getLogger(__name__)

STATE = Path("safety") / "dual_select.safetensors"

LOSS_TOLERANCE = 0.02
"""Relative; between the trainer's own loss and the one put together from the samples, in the first step, in bfloat16."""

FLUSH_EVERY = 50


class DualSelect(TrainingMethod):
    """One protected run's choice of references and samples.

    Every optimizer step applies `mean over its batches of Σ wᵢ gᵢ / Σ wᵢ, plus ρ·g_ref`: the mean over the accumulated batches
    and over the processes, so that two processes do what one does with twice the accumulation. The gradients do not pass
    through DistributedDataParallel; one all-reduce of the flat vector does its work.
    """

    name = "dual_select"
    action = "steered"
    config: DualSelectConfig

    def __init__(self, config: DualSelectConfig, context: Context) -> None:
        super().__init__(config, context)
        trainer, pool = context.trainer, context.references
        references = pool.rows
        self.kl = pool.kl
        self._trainer = trainer
        self._modules = list(context.prepared.modules)
        self._rows = references[ROW]
        self._flat = FlatFactors(self._modules)
        rows = used_columns(trainer, references.remove_columns(ROW))
        self._pool = ReferencePool(trainer, self._flat, rows, [len(ids) for ids in references["input_ids"]], kl=pool.kl)
        self._packed = rows_of(trainer).value == "packed"
        batch = trainer.args.per_device_train_batch_size
        self._whole_steps = batch == 1 and not self._packed
        self._unit = trainer.args.gradient_accumulation_steps if self._whole_steps else batch
        self._checked = self._kept_apart = False
        self._count = config.references or math.ceil((config.reference_share or 0) * len(references))
        if self._count > len(self._pool):
            raise ConfigurationError(
                f"dual_select.references = {self._count}: the pool has {len(self._pool)}; use at most as many, or reference_share"
            )
        self.log = SelectionLog(Path(trainer.args.output_dir))
        self._reset()

    @classmethod
    def ready(cls, config: DualSelectConfig, block: SafetyConfig, trainer: Any, references: References | None) -> None:
        """See `TrainingMethod.ready`; numbers the training rows.

        Raises:
            ConfigurationError: there is no pool, or one without answers beside a method that trains on other weights.
        """
        if references is None:
            raise ConfigurationError(
                "dual_select.reference_dataset is missing: name the pool of safety references there, or give reference_dataset to SafeSFTTrainer"
            )
        other = next((name for name, options in block.methods().items() if options.changes_weights), None)
        if other and references.kl:
            raise ConfigurationError(
                "dual_select.reference_dataset holds prompts without an answer: what the model says to them beside a buffer is not what it should say; give "
                f"references with answers, or remove {other}"
            )
        number_rows(trainer)

    def _reset(self) -> None:
        """As before the first step: a trainer may train again, and Transformers begins anew after running out of memory."""
        self._pending: list[tuple[int, Tensor]] = []
        self._waiting: list[Samples] = []
        self._sums: Tensor | None = None
        self._fresh_position = 0
        self.last_refresh = -1
        self._refresh_epoch = -1
        self.kept = self.seen = 0
        self._step = self._flat.zeros()
        self._task = self._flat.zeros()
        self._reference = self._flat.zeros()
        self._chosen: list[int] = []
        self._chosen_weights: list[float] = []
        self.reference_loss = float("nan")

    # One run.

    def begin(self, checkpoint: Path | None) -> None:
        """At the start of training: take up a checkpoint's state, and refuse a run that would end in its warm-up.

        Raises:
            ConfigurationError: no optimizer step would come after the warm-up.
        """
        state = self._trainer.state
        self.first_step = state.global_step
        self._reset()
        self._refuse_keeping_all()
        found = checkpoint is not None and (checkpoint / STATE).is_file() and self._load(checkpoint)
        if not found and state.global_step and state.is_world_process_zero:
            logger.warning(
                "dual_select: the checkpoint was trained without it up to step %s; it starts with a warm-up now", state.global_step
            )
        if state.max_steps <= self.first_step + self.config.warmup_steps:
            raise ConfigurationError(
                f"dual_select.warmup_steps = {self.config.warmup_steps}: the run has {state.max_steps - self.first_step} optimizer steps, so that nothing would "
                "ever be selected; use a smaller warmup_steps or train longer"
            )
        if state.is_world_process_zero:
            self.log.start(state.global_step if found else 0)

    def _refuse_keeping_all(self) -> None:
        """Refuse a `keep` that no batch of this training data exceeds, so that nothing would be dropped."""
        keep, data, batch = self.config.keep, self._trainer.train_dataset, self._unit
        if keep is None:
            return
        if LENGTHS in data.column_names:
            counts = sorted((len(lengths) for lengths in data[LENGTHS]), reverse=True)
            documents, most, found = (
                sum(counts),
                sum(counts[:batch]),
                f"no batch of {batch} packed rows holds more than {sum(counts[:batch])} documents",
            )
        else:
            documents = len(data)
            most, found = documents if self._packed else min(documents, batch), f"the training data has {documents} rows"
        if self._kept_of(most) >= most:
            raise ConfigurationError(
                f"dual_select.keep = {keep} of a {'step' if self._whole_steps else 'batch'} of {batch}: {found}, of which all would be kept; use a smaller keep"
            )
        if self._packed:
            loader = self._trainer.callback_handler.train_dataloader
            mean = documents / max(1, len(loader) * self._trainer.accelerator.num_processes)
            say = logger.warning if mean <= keep else logger.info
            say(
                "dual_select.keep = %s: a batch of packed rows holds %.1f documents on average; keep_tokens keeps a share of every batch",
                keep,
                mean,
            )

    def _kept_of(self, samples: int) -> int:
        """How many of these samples are kept. Of fewer than it chooses among, the same share; of packed rows, which hold any number, `keep`."""
        assert self.config.keep is not None  # noqa: S101  # where keep_tokens is given nobody asks
        return min(self.config.keep, samples) if self._packed else math.ceil(self.config.keep * samples / self._unit)

    @property
    def _warm(self) -> bool:
        return int(self._trainer.state.global_step) < self.first_step + self.config.warmup_steps

    @property
    def duties(self) -> tuple[str, ...]:
        """The choice in every batch, and the gradient after the last accumulated one."""
        return (self.name, f"{self.name}'s gradient")

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The chosen samples' mean loss of one batch, scaled as the trainer's step and log expect it."""
        if return_outputs:
            raise ConfigurationError(
                "return_outputs = True while training: dual_select needs the loss alone; the trainer is one that it does not know"
            )
        deepspeed = is_deepspeed()
        # The engine must not take this for the step's forward pass.
        chosen = unwrap(self._trainer.model) if deepspeed else model
        loss = self.select(chosen, inputs, lambda model, inputs: inner(model, inputs, False, None))
        self.mark()
        if deepspeed:
            loss = through_deepspeed(model, partial(self._flat.with_gradient, loss, self._given()))
        divides = trainer_divides_loss(self._trainer, items)
        return loss if divides else loss / self._trainer.current_gradient_accumulation_steps

    def after_backward(self, returned: Any, items: Any) -> None:
        """After an optimizer step's last batch, put the update's gradient on the factors, unless DeepSpeed has taken it from the loss."""
        if self._trainer.accelerator.sync_gradients:
            if not is_deepspeed():
                self._flat.add_to_gradients(self.finish_step())
            self.mark(f"{self.name}'s gradient")

    def _given(self) -> Tensor:
        """(P,) the gradient of one batch's loss, of which the accumulated ones' mean is the update's: all of it comes with the last batch."""
        trainer = self._trainer
        last = trainer.accelerator.sync_gradients
        return self.finish_step() * trainer.current_gradient_accumulation_steps if last else self._flat.zeros()

    def before_save(self) -> None:
        """What is saved next carries a report, which counts the samples of all processes."""
        self.drain()

    def select(self, model: Any, inputs: dict[str, Any], parent_loss: Any) -> Tensor:
        """One batch: score its samples, choose, and note the chosen ones' gradient. Batches of one sample wait for the step's last.

        Args:
            model: as the trainer gave it.
            inputs: the batch, with the samples' row numbers.
            parent_loss: (model, inputs) → the trainer's own loss as a mean over the batch's supervised tokens.

        Returns:
            The chosen samples' mean loss, for the log, which backpropagates to nothing; zero while samples wait.
        """
        trainer = self._trainer
        rows, parts, documents = take_documents(inputs)
        if self._due():
            self._refresh()
        collected = Collect(self._flat, documents.count)
        labels = inputs["labels"]
        with per_sample_gradients(self._flat, documents, collected), watched(unwrap(trainer.model)) as forward:
            with trainer.accelerator.no_sync(model):
                total = parent_loss(model, inputs)
            batch = sample_losses(forward, labels, documents, dft=getattr(trainer.args, "loss_type", None) == "dft", grad=False)
            with torch.autocast(total.device.type, enabled=False):
                total.backward()
        share = batch.tokens.sum().clamp(min=1) / batch.tokens.clamp(min=1)
        self._pool.fused = forward.fused
        if not self._checked:
            self._compare(total.detach(), batch)
        self._refuse_mixed(forward, documents)
        matrix, places = collected.matrix, torch.stack([rows, parts])
        self._waiting.append(Samples(places, batch.losses, batch.tokens, matrix, share.to(matrix)))
        kept = self._chosen_loss() if trainer.accelerator.sync_gradients or not self._whole_steps else torch.zeros_like(total)
        return kept.float() + torch.zeros((), device=kept.device, requires_grad=True)

    def _chosen_loss(self) -> Tensor:
        """Choose among the samples that wait, add the gradient of the chosen ones' mean loss to the step, and return that loss."""
        samples, self._waiting = Samples.joined(self._waiting), []
        weights = self._choose(samples)
        batches = self._trainer.current_gradient_accumulation_steps
        # Chosen once a step, they make up all of it, and the others' losses were zero.
        share = batches if self._whole_steps else 1
        self._step += dual_select.mean(weights, samples.gradients, samples.factors * (share / batches))
        return share * (weights * samples.losses).sum() / weights.sum()

    def _choose(self, samples: Samples) -> Tensor:
        """(n,) weights of samples, float64; those without a supervised token have none."""
        config, places = self.config, samples.places
        valid = samples.tokens > 0
        if self._warm:
            # As in the authors' code: the mean over samples, not over tokens. An all-masked batch must not divide by zero.
            return torch.where(valid.any(), valid, True).double()
        dots = (samples.gradients @ self._reference) * samples.factors
        squares = samples.gradients.square().sum(1) * samples.factors.square()
        cosines = dual_select.cosine(dots, squares, self._reference)
        scores = dual_select.score(samples.losses, cosines, config.mu_task, config.nu)
        ranked = torch.where(valid, scores, torch.inf)
        if config.keep_tokens is not None:
            mask = dual_select.within_budget(ranked, samples.tokens, config.keep_tokens)
        else:
            assert config.keep is not None  # noqa: S101  # one of the two is given
            mask = dual_select.lowest(ranked, self._kept_of(len(valid)))
        mask = mask & torch.where(valid.any(), valid, True)
        weights = dual_select.soft_weights(-ranked, config.task_temperature) if config.selection == "soft" else torch.ones_like(scores)
        weights = weights * mask
        self._note(torch.stack([places[0].to(scores), weights, scores, samples.losses.double(), cosines, places[1].to(scores)]))
        return weights

    def finish_step(self) -> Tensor:
        """(P,) after an optimizer step's last batch: the update's gradient, the same on every process."""
        accelerator = self._trainer.accelerator
        step = accelerator.reduce(self._step, reduction="mean") if accelerator.num_processes > 1 else self._step
        self._task += step
        if not self._warm and self.config.rho:
            reference = self._fresh() if self.config.reference_gradient == "fresh" else self._reference
            step = step + self.config.rho * reference
        self._step = self._flat.zeros()
        if len(self._pending) >= FLUSH_EVERY:
            self.drain()
        return step

    def metrics(self) -> dict[str, float]:
        """Since the last log: share kept, mean cosine, share of samples in conflict with the references; the references' loss."""
        if self._sums is None:
            return {}
        sums = self._trainer.accelerator.reduce(self._sums, reduction="sum") if self._trainer.accelerator.num_processes > 1 else self._sums
        self._sums = None
        seen, kept, cosine, conflict = sums.tolist()
        self.log.flush()
        return {
            "kept_share": kept / seen,
            "mean_cosine": cosine / seen,
            "conflict": conflict / seen,
            "reference_loss": self.reference_loss,
        }

    # The reference pool.

    def _due(self) -> bool:
        state = self._trainer.state
        if self._warm or self.last_refresh == state.global_step:
            return False
        if self.last_refresh < 0:
            return True
        if self.config.refresh_steps is not None:
            return bool(state.global_step - self.last_refresh >= self.config.refresh_steps)
        return self._epoch() > self._refresh_epoch

    def _epoch(self) -> int:
        return int((self._trainer.state.epoch or 0.0) + 1e-6)

    def _refresh(self) -> None:
        """Score the whole pool in a stream, each process its share; choose; compute the chosen ones' mean gradient in a second pass."""
        self.drain()
        trainer, config = self._trainer, self.config
        losses, dots, squares = self._pool.scored(self._task)
        cosines = dual_select.cosine(dots, squares, self._task)
        scores = dual_select.score(losses, cosines, config.mu_reference, config.nu)
        mask = dual_select.highest(scores, self._count)
        weights = dual_select.soft_weights(scores, config.reference_temperature) if config.selection == "soft" else torch.ones_like(scores)
        chosen = [index for index in scores.argsort(descending=True, stable=True).tolist() if mask[index]]
        self._chosen, self._chosen_weights = chosen, weights[chosen].tolist()
        self._reference = self._pool.mean_gradient(chosen, self._chosen_weights)
        if not bool(torch.isfinite(self._reference).all()) or not bool(self._reference.any()):
            raise ConfigurationError(
                "dual_select.reference_dataset: the gradient of the chosen references is zero or not finite, so that nothing could be selected by it; check "
                "the references and the learning rate"
            )
        self.reference_loss = float((weights[chosen] * losses[chosen]).sum() / weights[chosen].sum())
        self._task.zero_()
        self.last_refresh, self._refresh_epoch = trainer.state.global_step, self._epoch()
        if trainer.state.is_world_process_zero:
            columns = torch.stack([weights[chosen], scores[chosen], losses[chosen], cosines[chosen]]).tolist()
            self.log.add(_choice(trainer.state.global_step + 1, "reference", [self._rows[index] for index in chosen], columns))

    def _fresh(self) -> Tensor:
        """The gradient now of the next references in turn, as many as a per-device batch in all."""
        size = min(self._trainer.args.per_device_train_batch_size, len(self._chosen))
        places = [(self._fresh_position + i) % len(self._chosen) for i in range(size)]
        self._fresh_position = (self._fresh_position + size) % len(self._chosen)
        return self._pool.mean_gradient([self._chosen[i] for i in places], [self._chosen_weights[i] for i in places])

    # What is written.

    def _compare(self, total: Tensor, batch: Batch) -> None:
        """Once a run: the trainer's loss must be the token mean of the samples' losses, else their gradients are not theirs."""
        ours = (batch.losses * batch.tokens).sum() / batch.tokens.sum().clamp(min=1)
        if not torch.allclose(ours.double(), total.double(), rtol=LOSS_TOLERANCE, atol=1e-6):
            raise ConfigurationError(
                f"the trainer's loss is {total.item():.4g} where the mean over the batch's tokens is {ours.item():.4g}: it holds something else (a custom "
                "compute_loss_func, a router's auxiliary loss), which dual_select cannot divide among samples; remove it"
            )
        self._checked = True

    def _refuse_mixed(self, forward: Forward, documents: Documents) -> None:
        """Once a run: documents that share a row must not see each other, else none has a gradient of its own."""
        if not self._kept_apart and isinstance(documents, Stretches) and forward.call is not None:
            with self._trainer.accelerator.autocast():
                self._kept_apart = refuse_mixed_documents(forward.decoder, forward.call, documents)

    def _note(self, columns: Tensor) -> None:
        weights, cosines = columns[1], columns[4]
        sums = torch.stack([torch.ones_like(weights).sum(), (weights > 0).sum(), cosines.sum(), (cosines < 0).sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._pending.append((self._trainer.state.global_step + 1, columns))

    def drain(self, *, together: bool = True) -> None:
        """Put what is pending into the log file; every process calls it at the same step, or (not `together`) writes its own."""
        accelerator, pending = self._trainer.accelerator, self._pending
        self._pending = []
        entries = [(step, columns.tolist()) for step, columns in pending]
        if accelerator.num_processes > 1 and together:
            entries = gather_object(entries)
        for step, columns in sorted(entries, key=lambda entry: entry[0]):
            order = sorted(range(len(columns[0])), key=lambda i: (columns[1][i] == 0, columns[2][i]))
            rows, *values, parts = [[column[i] for i in order] for column in columns]
            self.kept += sum(weight > 0 for weight in values[0])
            self.seen += len(rows)
            if self._trainer.state.is_world_process_zero:
                self.log.add(_choice(step, "task", [int(row) for row in rows], values, [int(part) for part in parts]))
        if self._trainer.state.is_world_process_zero:
            self.log.flush()

    @property
    def _settings(self) -> dict[str, Any]:
        """The options after a round through JSON; where the pool lies does not matter, what it holds does."""
        settings: dict[str, Any] = json.loads(self.config.model_dump_json(exclude={"reference_dataset"}))
        return settings

    @cached_property
    def _pool_digest(self) -> str:
        """The number of the references and a digest of their tokens."""
        state = hashlib.sha256()
        for ids in self._pool.rows["input_ids"]:
            state.update(json.dumps(list(ids)).encode())
        return f"{len(self._pool)} ({state.hexdigest()[:16]})"

    def save(self, checkpoint: Path) -> None:
        """Keep in a checkpoint what a resumed run needs."""
        self.drain()
        if not self._trainer.state.is_world_process_zero:
            return
        facts = {**self._facts(), "adapter_sha256": self._adapter_of(checkpoint)}
        (checkpoint / STATE).parent.mkdir(parents=True, exist_ok=True)
        with replacing(checkpoint / STATE, error=ConfigurationError, setting="output_dir") as temporary:
            save_file({"task": self._task, "reference": self._reference}, temporary, metadata={"dual_select": json.dumps(facts)})

    def _facts(self) -> dict[str, Any]:
        return {
            "first_step": self.first_step,
            "start_norm": self.start_norm,
            "last_refresh": self.last_refresh,
            "refresh_epoch": self._refresh_epoch,
            "fresh_position": self._fresh_position,
            # A resumed run may refresh before its first forward tells.
            "fused": self._pool.fused,
            "chosen": self._chosen,
            "chosen_weights": self._chosen_weights,
            "reference_loss": self.reference_loss,
            "kept": self.kept,
            "seen": self.seen,
            "pool": self._pool_digest,
            "config": self._settings,
        }

    def _adapter_of(self, checkpoint: Path) -> str:
        model = unwrap(self._trainer.model)
        return sha256(adapter_folder(model, checkpoint, adapter_name(model)) / WEIGHTS)

    def _load(self, checkpoint: Path) -> bool:
        """Take up a checkpoint's state; False where another run has overwritten the adapter beside it."""
        path = checkpoint / STATE
        remedy = "go on from an earlier checkpoint"
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["dual_select"])
                task, reference = file.get_tensor("task"), file.get_tensor("reference")
            missing = [name for name in self._facts() if name not in facts]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{str(path)!r}: is damaged ({reason(error)}); {remedy}") from error
        if missing:
            raise ConfigurationError(f"{str(path)!r}: is damaged (it has no {missing[0]}); {remedy}")
        for name, tensor in (("task", task), ("reference", reference)):
            if not is_finite(tensor):
                raise ConfigurationError(f"{str(path)!r}: the {name} gradient holds NaN or infinity: {DIVERGED}")
        if facts.get("adapter_sha256") != self._adapter_of(checkpoint):
            return False
        if task.shape != (self._flat.size,) or facts["pool"] != self._pool_digest:
            raise ConfigurationError(
                f"{str(path)!r}: was written with {task.numel()} trainable entries and the references {facts['pool']}, this run has {self._flat.size} and "
                f"{self._pool_digest}: resume with the same adapter and the same dual_select.reference_dataset"
            )
        if changed := [name for name, value in self._settings.items() if facts["config"].get(name) != value]:
            raise ConfigurationError(
                f"dual_select.{changed[0]} = {self._settings[changed[0]]!r}: the checkpoint {str(path.parent.parent)!r} was trained with "
                f"{facts['config'].get(changed[0])!r}, so that the report would be wrong; resume with the same settings"
            )
        like = self._flat.like
        self._task, self._reference = task.to(like), reference.to(like)
        self.first_step, self.last_refresh, self._refresh_epoch = facts["first_step"], facts["last_refresh"], facts["refresh_epoch"]
        self._pool.fused = facts["fused"]
        self._fresh_position, self._chosen, self._chosen_weights = facts["fresh_position"], facts["chosen"], facts["chosen_weights"]
        self.reference_loss, self.kept, self.seen = facts["reference_loss"], facts["kept"], facts["seen"]
        self.start_norm = facts["start_norm"]
        return True

    def end(self, *, ended: bool) -> None:
        """When training ends, however it does: the log is whole, and the most-dropped rows' text lies beside it."""
        self.drain(together=ended)
        if not self._trainer.state.is_world_process_zero or not self.log.path.is_file():
            return
        dropped = [entry for entry in most_dropped(read_choices(self.log.path)) if entry.dropped][:MOST_TEXTS]
        wanted = {(entry.row, entry.part) for entry in dropped}
        write_texts(self.log.path.parent, texts(self._trainer.train_dataset, wanted, self._trainer.processing_class))

    @property
    def delay(self) -> int:
        """The warm-up."""
        return self.config.warmup_steps

    @property
    def not_yet(self) -> str:  # type: ignore[override]
        """What the report says during the warm-up."""
        return f"the run has not left its warm-up of {self.config.warmup_steps} steps"

    def describe(self, first: int, last: int) -> str:
        """See `TrainingMethod.describe`."""
        kept, seen = self.kept, self.seen
        for _, columns in self._pending:
            kept, seen = kept + int((columns[1] > 0).sum()), seen + columns.shape[1]
        correction = (
            f"{self.config.reference_gradient} reference gradient of weight {self.config.rho:g}" if self.config.rho else "no correction"
        )
        return (
            f"kept {kept} of {seen} samples in optimizer steps {first} to {last}; {correction}, from {self._count} of {len(self._pool)} "
            f"references{' by KL to the starting model' if self.kl else ''}"
        )


def _choice(step: int, kind: Any, rows: list[int], columns: Sequence[list[float]], parts: list[int] | None = None) -> Choice:
    weights, scores, losses, cosines = columns
    parts = parts if parts and any(parts) else None
    return Choice(step=step, kind=kind, indices=rows, parts=parts, weights=weights, scores=scores, losses=losses, cosines=cosines)
