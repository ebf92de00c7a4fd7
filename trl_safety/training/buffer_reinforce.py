"""Buffer-and-Reinforce for the user: the frozen buffer while training, and the merge with the ReinforceLoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from trl_safety.adapters.files import new_folder, sha256
from trl_safety.adapters.folder import WEIGHTS, AdapterFolder
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.lora import adapter_config, lora_modules, unwrap
from trl_safety.adapters.record import AdapterRecord, open_kind
from trl_safety.config.buffer_reinforce import BufferReinforceConfig
from trl_safety.corrections.buffer_reinforce import (
    NAME,
    PENDING,
    USER_ADAPTER,
    _factors,
    _under_user_names,
    check_rank,
    final_methods,
    merge_live,
)
from trl_safety.corrections.prepared import Prepared
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.report import SOURCES, LayerReport, MethodReport, came_with
from trl_safety.reports.source import adapter_folder, report_source

logger = logging.getLogger(__name__)


class BufferReinforce:
    """One protected run's buffer and merge.

    Args:
        config: the block's options.
        trainer: with its model.
        prepared: the user's adapter, checked.

    Raises:
        AdapterError: an adapter of the provider is missing, of another kind or for another base model, or the user's cannot be
            merged.
        ConfigurationError: an option would do nothing, or the buffer cannot act beside another one.
    """

    def __init__(self, config: BufferReinforceConfig, trainer: Any, prepared: Prepared) -> None:
        self.config = config
        self.first_step = 0
        self.start_norm = 0.0
        self._prepared = prepared
        if getattr(trainer.args, "torch_compile", False):
            raise ConfigurationError("torch_compile = True: a compiled model goes by the buffer; turn it off")
        setting = f"{NAME}.buffer = {config.buffer!r}"
        folder, record = open_kind(config.buffer, "buffer", f"{NAME}.buffer")
        self.frozen = FrozenAdapter(trainer.model, folder.factors, setting)
        self.base_check = record.check_layers(self.frozen.layers, setting)
        self.sources = {"buffer_sha256": sha256(folder.path / WEIGHTS)}
        self.reinforce: AdapterFolder | None = None
        if config.reinforce is not None:
            self.reinforce = self._open_reinforce(config.reinforce, trainer.model)

    def _open_reinforce(self, source: str, model: Any) -> AdapterFolder:
        setting = f"{NAME}.reinforce = {source!r}"
        folder, record = open_kind(source, "reinforce", f"{NAME}.reinforce")
        record.check_layers(FrozenAdapter(model, folder.factors, setting).layers, setting)
        self.sources["reinforce_sha256"] = sha256(folder.path / WEIGHTS)
        user = {m.name: _factors(m) for m in self._prepared.modules}
        factors = _under_user_names(folder, user, setting)
        check_rank(self.config, user, factors)
        lora = adapter_config(model, self._prepared.adapter)
        if lora.lora_bias:
            raise AdapterError("lora_bias = True: the biases of lora_B cannot be merged with the ReinforceLoRA; train without lora_bias")
        if not isinstance(unwrap(model), PeftModel):
            raise AdapterError(
                f"{type(unwrap(model)).__name__} holds its adapter without a PeftModel around it, which the merge needs: pass peft_config to the trainer, or a "
                "PeftModel"
            )
        extra = [name for name in factors if name not in user]
        if extra and lora.modules_to_save:
            raise AdapterError(
                f"modules_to_save = {lora.modules_to_save!r}: the ReinforceLoRA also adapts {extra[0]!r}, which cannot be added to an adapter with whole "
                "modules; add that layer to target_modules, or merge the saved adapters with `trl-safety merge-reinforce`"
            )
        return folder

    def attached(self) -> AbstractContextManager[None]:
        """The buffer acts within one training step: forward, backward and what gradient checkpointing computes again."""
        return self.frozen.in_step()

    def report(self, steps: int) -> MethodReport:
        """Of the training alone, until optimizer step `steps`."""
        acted = steps > self.first_step
        summary = (
            f"trained beside the frozen buffer in optimizer steps {self.first_step + 1} to {steps}, and detached"
            if acted
            else "no step was trained"
        )
        if self.first_step:
            summary += f"; steps 1 to {self.first_step} were trained without it"
        if self.start_norm:
            summary += f"; {came_with(self.start_norm)}"
        action = LayerReport(action="buffered" if acted else "left_alone", reason=None if acted else summary)
        return MethodReport(
            name=NAME,
            source=SOURCES[NAME],
            reconstruction=False,
            settings={**self.config.model_dump(), **self.sources},
            acted=acted and self.first_step == 0 and not self.start_norm and self.reinforce is None,
            summary=summary + (PENDING if self.reinforce else ""),
            steps=(self.first_step + 1, steps) if acted else None,
            layers={module.name: action for module in self._prepared.modules},
        )


class ReinforceCallback(TrainerCallback):
    """When training ends, and after any correction: save the user's adapter alone, then merge it with the ReinforceLoRA in memory.

    The next `save_model()` writes the merged adapter.
    """

    def __init__(self, method: BufferReinforce, reports: Callable[[], list[MethodReport]], prepared: Prepared, subspace: Any) -> None:
        self._method, self._reports, self._prepared, self._subspace = method, reports, prepared, subspace

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See that the user's adapter alone can be saved, before it is trained."""
        folder = (Path(args.output_dir) / USER_ADAPTER).parent
        if state.is_world_process_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AdapterError(
                    f"output_dir = {args.output_dir!r}: {str(folder)!r} cannot be made ({error.strerror}); the user's adapter is kept there"
                ) from error

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Save, merge, report."""
        inner = cast(Any, unwrap(model))
        adapter = self._prepared.adapter
        modules = lora_modules(inner, adapter)
        earlier = self._reports()
        if state.is_world_process_zero:
            with new_folder(Path(args.output_dir) / USER_ADAPTER, error=AdapterError, setting="output_dir", replace=True) as folder:
                inner.save_pretrained(str(folder), selected_adapters=[adapter])
                record = AdapterRecord.of_layers("user", self._prepared.base_model, {m.name: m.layer.get_base_layer() for m in modules})
                record.write(adapter_folder(inner, folder, adapter))
        user = {module.name: _factors(module) for module in modules}
        assert self._method.reinforce is not None  # noqa: S101  # the callback exists only then
        factors = _under_user_names(self._method.reinforce, user, NAME)
        merges = merge_live(inner, adapter, user, factors, self._method.config)
        methods = final_methods(earlier, merges, self._method.config, user, self._method.sources)
        report_source(inner, adapter).freeze(inner, self._prepared.report(self._subspace, methods, final=True))
        if state.is_world_process_zero:
            logger.warning("%s: %s", methods[-1].source, methods[-1].summary)
