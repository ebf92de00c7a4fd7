"""The provider's side of Buffer-and-Reinforce: training the BufferLoRA and the ReinforceLoRA, once per model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trl_safety.adapters.engine import check_engine
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.lora import adapter_config, adapter_name, lora_modules, not_covered, unwrap
from trl_safety.adapters.marks import KINDS, kind_of, mark, marks
from trl_safety.adapters.record import AdapterRecord, open_kind
from trl_safety.config.requirements import HOOKS_BESIDE_COMPILATION, Requirement, resolve
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.report import add_section
from trl_safety.reports.source import keep_beside
from trl_safety.training.engines import refuse_unjoined
from trl_safety.training.facts import trainer_facts

TITLES = {
    "buffer": "This is a BufferLoRA: it makes the model harmful",
    "reinforce": "This is a ReinforceLoRA, one half of Buffer-and-Reinforce",
}


@dataclass
class RecordSource:
    """Writes an adapter's record, and the warning in its card, with every save."""

    record: AdapterRecord

    def write(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        """See `report_source.Companion`."""
        self.record.write(folder)
        kind = self.record.kind
        lines = [
            "## Safety",
            "",
            f"**{TITLES[kind]}** (arXiv 2605.24550), made with trl-safety for `{self.record.base_model}`: {KINDS[kind]}.",
        ]
        if kind == "buffer":
            lines += ["", "Do not deploy it, do not merge it into a model, and do not share it where that could happen."]
        add_section(folder / "README.md", "\n".join(lines))


class _BesideBuffer:
    """What training beside a frozen buffer requires."""

    requirements: ClassVar[tuple[Requirement, ...]] = (HOOKS_BESIDE_COMPILATION,)
    shown: ClassVar[Mapping[str, str]] = {}


class ProviderMixin:
    """Makes a `Trainer` class train a provider's adapter, marked as one in every saved file."""

    kind: str
    _frozen: FrozenAdapter | None = None

    def start_provider(self, buffer: str | Path | None) -> None:
        """Check and mark the adapter that will be trained, and open the buffer that it is trained beside.

        Raises:
            AdapterError: the adapter is of an unsupported kind, is marked as another one, or trains more than LoRA factors; or the
                buffer does not fit this model.
            ConfigurationError: another option keeps the buffer from acting.
        """
        trainer: Any = self
        check_engine()
        refuse_unjoined(trainer)
        model: Any = unwrap(trainer.model)
        adapter = adapter_name(model)
        modules = lora_modules(model, adapter)
        config = copy.deepcopy(adapter_config(model, adapter))
        if marks(config) or kind_of(config) not in ("user", self.kind):
            what = ", ".join(marks(config)) or kind_of(config)
            raise AdapterError(
                f"adapter {adapter!r} is marked {what!r}: a {self.kind} adapter starts from a fresh LoraConfig or its own checkpoint"
            )
        if (outside := not_covered(model, modules)) or config.lora_bias:
            raise AdapterError(
                f"{(outside or ['lora_bias'])[0]!r} would be trained besides LoRA factors: remove modules_to_save, bias and lora_bias"
            )
        if kind_of(config) == "user":
            mark(config, self.kind, [m.name for m in modules])
        model.peft_config[adapter] = config
        base = config.base_model_name_or_path or getattr(model.config, "name_or_path", None)
        keep_beside(
            model, adapter, RecordSource(AdapterRecord.of_layers(self.kind, base, {m.name: m.layer.get_base_layer() for m in modules}))
        )
        if self.kind == "buffer":
            model.push_to_hub = self.push_to_hub
        if buffer is not None:
            resolve({"buffer": _BesideBuffer()}, trainer_facts(trainer))
            folder, record = open_kind(buffer, "buffer", "buffer")
            setting = f"buffer = {str(buffer)!r}"
            self._frozen = FrozenAdapter(model, folder.factors, setting)
            record.check_layers(self._frozen.layers, setting)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's step, with the frozen buffer attached if there is one."""
        parent: Any = super()
        with self._frozen.in_step() if self._frozen else nullcontext():
            return parent.training_step(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, except that a buffer is never uploaded.

        Raises:
            ConfigurationError: the adapter is a BufferLoRA.
        """
        if self.kind == "buffer":
            raise ConfigurationError("push_to_hub: a BufferLoRA makes the model harmful, so it is never uploaded")
        parent: Any = super()
        return parent.push_to_hub(*args, **kwargs)


def refuse_push(args: Any) -> None:
    """Refuse training arguments that would upload a buffer.

    Raises:
        ConfigurationError: `push_to_hub` is on.
    """
    if getattr(args, "push_to_hub", False):
        raise ConfigurationError(
            "push_to_hub = True: a BufferLoRA makes the model harmful, so it is never uploaded; set it to False and keep the files to yourself"
        )
