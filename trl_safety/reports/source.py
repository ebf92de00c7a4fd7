"""The safety report of a live model's adapter: carried by the model, and written beside the adapter with every save."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from trl_safety.adapters.fingerprint import sample
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.lora import adapter_config, unwrap
from trl_safety.adapters.shards import sharded
from trl_safety.errors import ReportError
from trl_safety.reports.report import SafetyReport, changed_since, meaning, write_report

CAST_DIFFERENCE = 2**-8
"""A cast to bfloat16 changes an entry by at most 2⁻⁹ of its value; training changes the adapter more."""


class Companion(Protocol):
    """Writes files of ours beside a live model's adapter."""

    def write(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        """Called with the folder that an adapter was just saved to, and with the saved state if it was not read from the model."""


class ReportSource:
    """Gives the report for every save of one adapter.

    During a protected run the report is made anew at every save. When the run ends, the report is frozen together with sampled
    entries of everything that PEFT saves for the adapter: later training without protection is recognised by them, in whichever
    copy of the model it happens.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._live: Callable[[], SafetyReport] | None = None
        self._report: SafetyReport | None = None
        self._samples: dict[str, Tensor] = {}
        self._meaning: str | None = None

    def live(self, provider: Callable[[], SafetyReport]) -> None:
        """Call `provider` at every save, until `freeze`."""
        self._live = provider

    def freeze(self, model: Any, report: SafetyReport) -> None:
        """Give this report from now on, as long as the adapter is unchanged."""
        self._live, self._report, self._samples = None, report, self._sample(model)
        self._meaning = meaning(adapter_config(model, self.adapter).to_dict())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context every save gives the report made at its start: a process that saves alone cannot gather the others' shards."""
        live = self._live
        if live is not None:
            report = live()
            self._live = lambda: report
        try:
            yield
        finally:
            self._live = live

    def current(self, model: Any, state: Mapping[str, Tensor] | None = None) -> SafetyReport:
        """The current report of the model's adapter, or of the model's `state` if that was gathered from shards."""
        if self._live is not None:
            return self._live()
        if self._report is None:
            raise ReportError("the model carries no safety report")
        return self._report if self._unchanged(model, state) else changed_since(self._report)

    def write(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None) -> None:
        """See `Companion`."""
        write_report(folder, self.current(model, state))

    def write_beside(self, folder: Path) -> None:
        """Write the report of an adapter that was saved without the model's `save_pretrained`, if its training has ended.

        Raises:
            ReportError: the report cannot be written.
        """
        if self._report is None:
            return
        with safe_open(str(folder / WEIGHTS), framework="pt") as handle:
            saved = {name: sample(handle.get_tensor(name)).float() for name in handle.keys()}  # noqa: SIM118  # no mapping
        write_report(folder, self._report if self._alike(saved) else changed_since(self._report))

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle made during a run has an unknown state: it is not reported as protected."""
        report = changed_since(self._live()) if self._live is not None else self._report
        return {"adapter": self.adapter, "_live": None, "_report": report, "_samples": dict(self._samples), "_meaning": self._meaning}

    def _unchanged(self, model: Any, state: Mapping[str, Tensor] | None) -> bool:
        same = meaning(adapter_config(model, self.adapter).to_dict()) == self._meaning
        return same and self._alike(self._sample(model, state))

    def _alike(self, now: Mapping[str, Tensor]) -> bool:
        return now.keys() == self._samples.keys() and all(_near(now[name], before) for name, before in self._samples.items())

    def _sample(self, model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        saved = get_peft_model_state_dict(unwrap(model), state_dict=state, adapter_name=self.adapter, save_embedding_layers=False)
        return {name: sample(tensor).float() for name, tensor in saved.items()}


def _near(now: Tensor, before: Tensor) -> bool:
    """Whether two samples are one tensor's, up to a cast. NaN and infinity are equal to themselves."""
    if now.shape != before.shape or not torch.equal(torch.isfinite(now), torch.isfinite(before)):
        return False
    now, before = (torch.where(torch.isfinite(tensor), tensor, 0) for tensor in (now, before))
    return bool(torch.linalg.vector_norm(now - before) <= CAST_DIFFERENCE * torch.linalg.vector_norm(before))


def report_source(model: Any, adapter: str) -> ReportSource:
    """The adapter's report source, created on first use."""
    source: ReportSource = _companions(model).setdefault(adapter, ReportSource(adapter))
    return source


def forget_report(model: Any, adapter: str) -> None:
    """Report nothing from now on, after an interrupted run whose adapter can no longer be gathered."""
    _companions(model).pop(adapter, None)


def keep_beside(model: Any, adapter: str, companion: Companion) -> None:
    """Write the companion's files with every save of an adapter."""
    _companions(model)[adapter] = companion


def _companions(model: Any) -> dict[str, Any]:
    """The companion of each adapter. From the first use on, `model.save_pretrained` writes their files, whoever calls it.

    A Trainer's callbacks are not notified of `save_model()`, and a report that only one way of saving writes would be missing
    from the others. The wrapper is a bound method on the instance, so that a deep copy of the model gets its own.
    """
    model = unwrap(model)
    companions: dict[str, Any] = vars(model).setdefault("_trl_safety_reports", {})
    model.save_pretrained = MethodType(save_pretrained, model)
    return companions


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`, followed by the safety report (or a provider's record) in the adapter's folder.

    Raises:
        ReportError: the adapter is to be saved as a pickle, or its report cannot be written.
    """
    original = type(self).save_pretrained
    call = inspect.signature(original).bind(self, *args, **kwargs)
    call.apply_defaults()
    asked = {**call.arguments, **call.arguments.get("kwargs", {})}
    if not asked.get("safe_serialization", True):
        raise ReportError("safe_serialization = False: would save the adapter as a pickle, which no report covers; leave it True")
    state = asked.get("state_dict")
    if state is None and sharded(self):
        raise ReportError("save_pretrained: the model's parameters are sharded: save it with trainer.save_model(), which gathers them")
    result = original(self, *args, **kwargs)
    if asked.get("is_main_process", True):
        for adapter, source in self._trl_safety_reports.items():
            if adapter in self.peft_config and adapter in (asked.get("selected_adapters") or [adapter]):
                source.write(self, adapter_folder(self, Path(asked["save_directory"]), adapter), state)
    return result


def adapter_folder(model: Any, folder: Path, adapter: str) -> Path:
    """Where `save_pretrained(folder)` puts an adapter: PEFT gives every adapter but the default its own subfolder."""
    return folder / adapter if isinstance(model, PeftModel) and adapter != "default" else folder
