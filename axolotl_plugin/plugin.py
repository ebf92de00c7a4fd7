"""`SafetyPlugin`: connects Axolotl's hooks to trl_safety. It holds no mathematics, and imports nothing of ours before a hook runs.

Axolotl 0.21 loads it in every run, through the entry point: without a `safety:` block in the configuration, nothing here may fail or
have any effect.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.integrations import base
from axolotl.integrations.base import BasePlugin, PluginManager

from axolotl_plugin import PLUGIN, SHORT_NAME

if TYPE_CHECKING:
    from trl_safety.config.block import SafetyConfig


def loaded_by_axolotl() -> bool:
    """Whether Axolotl (0.21 and newer) finds the plugin by its entry point, so that a `safety:` block alone is enough."""
    found = getattr(base, "get_builtin_plugins", tuple)
    return PLUGIN in found()


class SafetyPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl ships no annotations
    """Validates the `safety:` block with the classes that `SafeSFTTrainer` uses, and runs its methods in Axolotl's trainer.

    Attributes:
        active: whether the run that was registered last has a `safety:` block.
    """

    _written: frozenset[str] = frozenset()
    """The keys that the user wrote, before Axolotl added its own defaults."""
    _switched_off: list[str] = []  # noqa: RUF012  # replaced, never changed
    """What was switched off in the configuration so that the methods can act."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        if loaded_by_axolotl():
            # Axolotl takes a name in `plugins` for loaded if it finds it here. It could not import this one, which has no dot.
            PluginManager().plugins.setdefault(SHORT_NAME, BasePlugin())

    def register(self, cfg: Any) -> None:
        """Refuse a plugin line without a block, which would protect nothing, and a provider's adapter to train or merge.

        Raises:
            ConfigurationError: there is no `safety:` block, but the plugin line or a misspelt key asks for one.
            AdapterError: `lora_model_dir` is a BufferLoRA or a ReinforceLoRA, or its configuration cannot be read.
        """
        self.active = bool(cfg.get("safety"))
        listed = [str(name).replace(":", ".") for name in cfg.get("plugins") or []]
        missing = None if self.active else _without_block(cfg, [name for name in listed if name in (PLUGIN, SHORT_NAME)])
        if not self.active and missing is None:
            return
        from trl_safety.errors import ConfigurationError

        if missing is not None:
            raise ConfigurationError(missing)
        if loaded_by_axolotl():
            _stand_where_listed(listed)
        self._written = frozenset(key for key, value in cfg.items() if value is not None)
        if folder := cfg.get("lora_model_dir"):
            _check_start(str(folder))

    def get_input_args(self) -> str | None:
        """The class that adds the `safety` key to Axolotl's own schema, if there is a block."""
        return "axolotl_plugin.args.SafetyPluginArgs" if self.active else None

    def pre_model_load(self, cfg: Any) -> None:
        """Check the options once more: Axolotl has switched some on by itself since it validated what the user wrote.

        Raises:
            ConfigurationError: one of them keeps a method from acting.
        """
        if not self.active:
            return
        from axolotl_plugin.rules import check

        self._switched_off = check(cfg, safety_of(cfg), self._written)

    def get_trainer_cls(self, cfg: Any) -> Any:
        """Axolotl's trainer with the safety mixin if a method acts during training, else None.

        Also None with `rl:`, where Axolotl would call a plugin's class without the model and the other arguments that the trainer needs;
        see `post_trainer_create`.
        """
        if not self.active or cfg.get("rl"):
            return None
        from trl_safety.training.start import needs_trainer_class

        return _safe_trainer_class() if needs_trainer_class(safety_of(cfg)) else None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Check that every method can act, and attach it.

        Raises:
            ConfigurationError: another plugin chose the trainer class, so the loss cannot be changed.
            AdapterError: the model's adapter cannot be protected.
            SubspaceError: an adapted layer is not in the subspace.
        """
        if not self.active:
            return
        from trl_safety.errors import ConfigurationError
        from trl_safety.training.mixin import SafetyMixin
        from trl_safety.training.start import add_correction, needs_trainer_class

        safety = safety_of(cfg)
        if cfg.get("rl") and needs_trainer_class(safety) and not isinstance(trainer, SafetyMixin):
            trainer_class: Any = type(trainer)
            trainer.__class__ = _with_safety(trainer_class)
        if not needs_trainer_class(safety):
            add_correction(trainer, safety, self._switched_off)
        elif isinstance(trainer, SafetyMixin):
            trainer.start_safety(safety, None, references(cfg, safety, trainer), self._switched_off)
        else:
            method = next(iter(safety.methods()))
            raise ConfigurationError(
                f"plugins = {list(cfg.get('plugins') or [])}: another plugin, listed before axolotl_plugin.SafetyPlugin, chose the trainer class "
                f"{type(trainer).__name__}, in which safety.{method} cannot act; list axolotl_plugin.SafetyPlugin first, or remove one of the two"
            )

    def post_train(self, cfg: Any, model: Any) -> None:
        """Add the safety section to the model card, the last file that Axolotl writes.

        Axolotl calls this before and after it saves; the correction has acted by then. With FSDP it writes the adapter itself, without
        the model's `save_pretrained`, which would have written the report.
        """
        if not self.active:
            return
        from trl_safety.reports.report import REPORT, add_to_card, read_report
        from trl_safety.reports.source import report_source

        folder = Path(cfg.get("output_dir"))
        if int(os.environ.get("RANK") or cfg.get("local_rank") or 0) != 0:
            return
        if (cfg.get("fsdp_config") or cfg.get("fsdp")) and (folder / "adapter_model.safetensors").is_file():
            report_source(model, "default").write_beside(folder)
        if (folder / REPORT).is_file() and (folder / "README.md").is_file():
            add_to_card(folder / "README.md", read_report(folder))


def _check_start(folder: str) -> None:
    """Refuse a starting adapter that cannot be read or is a provider's. One on the Hub is read once it has been fetched."""
    from trl_safety.adapters.folder import CONFIG, WEIGHTS, AdapterFolder, read_config
    from trl_safety.adapters.marks import refuse_provider
    from trl_safety.errors import AdapterError

    setting, path = f"lora_model_dir = {folder!r}", Path(folder)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not folder.startswith("."):
        return
    try:
        # A pickle is Axolotl's affair.
        pickled = (path / "adapter_model.bin").is_file() and not (path / WEIGHTS).is_file()
        config = read_config(path / CONFIG) if pickled else AdapterFolder.open(path).config
    except AdapterError as error:
        raise AdapterError(f"{setting}: {error}") from error
    refuse_provider(config, setting)


def _without_block(cfg: Any, named: list[str]) -> str | None:
    """The error if something in a configuration without a `safety:` block asks for one, else None.

    Without a plugin line, which Axolotl 0.21 does not need, a misspelt `safety` is recognised by its contents.
    """
    close = difflib.get_close_matches("safety", [key for key in cfg if isinstance(key, str) and key != "safety"], n=1)
    meant = f" (is {close[0]!r} a misspelling?)" if close else ""
    if named:
        return f"safety{meant} is missing: plugins names {named[0]}, but nothing would be protected; add a `safety:` block or remove the plugin"
    if "safety" in cfg:
        return f"safety = {cfg['safety']!r} has no method: nothing would be protected; add one, or remove the key"
    if close and _looks_like_a_block(cfg[close[0]]):
        return f"safety{meant} is missing: Axolotl ignores unknown keys, so nothing would be protected; correct the key"
    return None


def _looks_like_a_block(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    from trl_safety.config.block import METHODS

    return not {"subspace", *METHODS}.isdisjoint(value)


def _stand_where_listed(listed: list[str]) -> None:
    """Move the plugin to its place in `plugins`, or to the end: the first plugin that provides a trainer class wins.

    Axolotl loads entry points before the plugins of the configuration, so the safety block would silently override a plugin
    listed before it.
    """
    plugins = PluginManager().plugins
    places = [listed.index(name) for name in (PLUGIN, SHORT_NAME) if name in listed]
    for name in [PLUGIN, *(listed[min(places) + 1 :] if places else [])]:
        if name in plugins:
            plugins.move_to_end(name)


def safety_of(cfg: Any) -> SafetyConfig:
    """The safety block of an Axolotl configuration, whose `DictDefault` returns None for every missing key."""
    from trl_safety.config.block import SafetyConfig

    block = cfg.get("safety")
    return SafetyConfig.parse(block.to_dict() if hasattr(block, "to_dict") else block)


def references(cfg: Any, safety: SafetyConfig, trainer: Any) -> dict[str, Any]:
    """The pools of the methods that read one, prepared as Axolotl prepares the training data.

    A path is read in the format of the first entry of `datasets`; if that is plain text or tokens, as the pool's own prompt and completion
    or messages. A mapping takes the keys of a `datasets` entry. In conversations only the answers are supervised.

    Raises:
        ConfigurationError: no pool is named, or Axolotl dropped all of its rows.
    """
    from trl_safety.training.references import pools

    return {name: _pool(cfg, setting, getattr(safety, name), trainer) for name, setting in pools(safety).items()}


def _pool(cfg: Any, setting: str, options: Any, trainer: Any) -> Any:
    from trl_safety.errors import ConfigurationError
    from trl_safety.training.data import load_rows
    from trl_safety.training.documents import ROW, with_rows
    from trl_safety.training.references import References, prompts_only, tokenised_answers, tokenised_prompts

    source = getattr(options, setting.rpartition(".")[2])
    if source is None:
        raise ConfigurationError(f"{setting} is missing: give a .jsonl file, a Hub id, or an entry as under `datasets`")
    if isinstance(source, str):
        raw = with_rows(load_rows(source, setting), setting)
        if prompts_only(raw, setting):
            return References(tokenised_prompts(raw, trainer.processing_class, cfg.get("sequence_len"), setting), kl=True)
        first = cfg.get("datasets")[0]
        if _has_answers_of_its_own(raw.column_names, first):
            rows = tokenised_answers(raw, trainer.processing_class, cfg.get("sequence_len"), setting)
            if len(rows) < len(raw):
                raise ConfigurationError(
                    f"{setting} = {source!r}: {len(raw) - len(rows)} of {len(raw)} references have no answer within sequence_len = "
                    f"{cfg.get('sequence_len')}: raise it, or remove those rows"
                )
            return References(rows, kl=False)
        source = {**first, "path": source, "split": "train"}
        source["ds_type"] = {".jsonl": "json"}.get(suffix := Path(source["path"]).suffix, suffix.removeprefix(".")) or first.get("ds_type")
        source.pop("data_files", None)
    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.dict import DictDefault

    own = DictDefault(cfg.to_dict())
    own.update(
        DictDefault(
            {
                "datasets": [source],
                "test_datasets": None,
                "val_set_size": 0,
                "sample_packing": False,
                "shuffle_merged_datasets": False,
                # True would supervise the references' requests as well.
                "train_on_inputs": False,
            }
        )
    )
    prepared, _, _, _ = prepare_datasets(own, trainer.processing_class)
    if not len(prepared):
        raise ConfigurationError(f"{setting} = {source!r}: Axolotl kept none of its rows within sequence_len")
    return References(with_rows(prepared.remove_columns([ROW] if ROW in prepared.column_names else []), setting), kl=False)


def _has_answers_of_its_own(columns: list[str], first: Any) -> bool:
    """Whether references are conversations that the first entry of `datasets` would not read, or would read as one text."""
    from trl_safety.training.data import splittable

    kind = str(first.get("type") or "completion")
    conversation = kind.startswith("chat_template") and (first.get("field_messages") or "messages") not in columns
    return splittable(columns) and "input_ids" not in columns and (kind == "completion" or kind.startswith("completion:") or conversation)


@cache
def _safe_trainer_class() -> Any:
    from axolotl.core.trainers import AxolotlTrainer

    return _with_safety(AxolotlTrainer)


@cache
def _with_safety(trainer_class: Any) -> Any:
    """Axolotl's trainer class with the mixin in front. The mixin has no constructor, so an existing trainer can take this class."""
    from trl_safety.training.mixin import SafetyMixin

    return type(f"Safe{trainer_class.__name__}", (SafetyMixin, trainer_class), {"__doc__": "Axolotl's trainer with the safety block."})
