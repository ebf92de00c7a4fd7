"""Processes that start with everything imported: forked from a server that each pytest worker starts once.

A new interpreter takes ten seconds to import Transformers and TRL. A child otherwise behaves the same: it runs a module as
`__main__`, with its own arguments, environment and output, and can be killed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PRELOADED = ["tests.tiny", "trl.trainer.sft_trainer", "trl_safety.training.trainer"]
if importlib.util.find_spec("axolotl"):
    PRELOADED += ["axolotl.cli.main", "axolotl.cli.train", "axolotl.core.builders"]


@dataclass(frozen=True)
class Done:
    """How a process ended: its status (negative if a signal ended it) and its output on both streams."""

    returncode: int
    output: str


def _child(module: str, arguments: list[str], environment: dict[str, str], folder: str, output: str) -> None:
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def run(
    module: str,
    *arguments: object,
    processes: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[Done]:
    """Run a module; with `processes`, in so many, which find each other like torchrun's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        started = []
        for rank in range(processes or 1):
            own = {"OMP_NUM_THREADS": "1", **(environment or {})}
            if processes:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            output = f"{scratch}/{rank}"
            process = context.Process(target=_child, args=(module, [*map(str, arguments)], own, str(folder or Path.cwd()), output))
            process.start()
            started.append((process, output))
        try:
            for process, _ in started:
                process.join()
        finally:
            # A test that is stopped while it waits leaves no process behind.
            for process, _ in started:
                process.kill()
        return [
            Done(process.exitcode, Path(output).read_text(errors="replace") if Path(output).exists() else "") for process, output in started
        ]
