"""The lab's experiment: aligned models, poisoned fine-tuning, every method beside its control, over pairs and seeds."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trl_safety.adapters.files import replacing
from trl_safety.errors import SafetyError
from trl_safety.lab import pair as pair_module
from trl_safety.lab import results, rows
from trl_safety.lab import world as world_module
from trl_safety.lab.lab import Lab
from trl_safety.lab.results import Outcome
from trl_safety.lab.rows import GROUPS
from trl_safety.lab.settings import FULL, Settings


@dataclass(frozen=True)
class Task:
    """The rows of one group on one pair and one seed.

    Attributes:
        folder: the lab's output folder.
        pair: seed of the pair and its language.
        seed: of the fine-tuning.
        innocent: whether the base has never seen a forbidden topic.
        group: a key of `GROUPS`.
        settings: of the fine-tuning and the methods.
    """

    folder: Path
    pair: int
    seed: int
    innocent: bool
    group: str
    settings: Settings


def run(
    output: Path,
    *,
    pairs: int = 1,
    seeds: int = 3,
    first: int = 0,
    bases: Collection[bool] = (False,),
    methods: Collection[str] = tuple(GROUPS),
    settings: Settings = FULL,
    workers: int = 2,
    echo: Callable[[str], None] | None = None,
) -> list[Outcome]:
    """Run the experiment, print a line for every finished row and the table, write `results.json` and `results.png`.

    Rows are kept in `output` by what they depend on, so that an interrupted run continues, and a new method costs only its own rows.
    Every worker uses one thread, so the number of cores does not change any result.

    Args:
        output: the folder to write to. Several commands may share it.
        pairs: base/aligned pairs, each with its own language.
        seeds: fine-tuning runs of every method on every pair.
        first: seed of the first pair and of the first fine-tuning.
        bases: whether the base has never seen a forbidden topic; see `make_pair`. Both kinds may be given.
        methods: the groups of rows to make.
        settings: of the fine-tuning and the methods.
        workers: processes.
        echo: takes each line; printed by default.

    Raises:
        SafetyError: a pair could not be made, or the folder cannot be written to. The other rows are still made and kept.
    """
    echo = echo or functools.partial(print, flush=True)
    started = time.perf_counter()
    places = [(pair, innocent) for innocent in bases for pair in range(first, first + pairs)]
    tasks = [
        Task(output, pair, seed, innocent, group, settings)
        for seed in range(first, first + seeds)
        for pair, innocent in places
        for group in GROUPS
        if group in methods
    ]
    made: dict[Task, list[Outcome]] = {}
    failures: list[SafetyError] = []
    with _pool(min(workers, len(tasks))) as pool:
        described: dict[tuple[int, bool], dict[str, Any]] = {}

        def ready(place: tuple[Path, int, bool, Settings], found: tuple[dict[str, Any], str]) -> None:
            described[place[1:3]], line = found
            echo(line)

        _gather(pool, _make_pair, [(output, *place, settings) for place in places], failures, ready)
        if failures:
            raise failures[0]
        norms = [described[place] for place in places]

        def finished(task: Task, outcomes: list[Outcome]) -> None:
            made[task] = outcomes
            for outcome in outcomes:
                echo(results.line(outcome))
            results.write(output / "results.json", _in_order(tasks, made), settings, places=norms)

        _gather(pool, _make_rows, tasks, failures, finished)
    outcomes = _in_order(tasks, made)
    if outcomes:
        results.plot(output / "results.png", outcomes)
        results.show(outcomes, norms, settings)
        echo(f"{output / 'results.json'} and {output / 'results.png'}: written; {time.perf_counter() - started:.0f} s")
    if failures:
        raise failures[0]
    return outcomes


def _in_order(tasks: list[Task], made: dict[Task, list[Outcome]]) -> list[Outcome]:
    return [outcome for task in tasks for outcome in made.get(task, [])]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _gather(
    pool: ProcessPoolExecutor, work: Callable[[Any], Any], items: list[Any], failures: list[SafetyError], done: Callable[[Any, Any], None]
) -> None:
    """Pass on each item's result as it arrives, and collect the errors."""
    running = {pool.submit(work, item): item for item in items}
    for future in as_completed(running):
        try:
            result = future.result()
        except SafetyError as error:
            failures.append(error)
        else:
            done(running[future], result)


def _start() -> None:
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=2)
def _lab(folder: Path, pair: int, innocent: bool, settings: Settings) -> Lab:
    return Lab(folder, pair, innocent=innocent, settings=settings)


def _make_pair(place: tuple[Path, int, bool, Settings]) -> tuple[dict[str, Any], str]:
    """What a pair is like, and the line that says it."""
    started = time.perf_counter()
    with quiet():
        lab = _lab(*place)
    norms = lab.norms() | {"pair": lab.pair, "innocent": lab.innocent}
    return norms, f"{lab.folder.name}: ready after {time.perf_counter() - started:.0f} s; ‖V‖ is {norms['v_to_w']:.1%} of ‖W‖"


def _make_rows(task: Task) -> list[Outcome]:
    """A task's rows, read from the folder if they are kept there."""
    with quiet():
        lab = _lab(task.folder, task.pair, task.innocent, task.settings)
        name = f"seed-{task.seed}-{task.group}-{_key(lab, task)}"
        kept = lab.folder / "rows" / f"{name}.json"
        kept.parent.mkdir(exist_ok=True)
        with lab.lock(name):
            if kept.is_file():
                return [Outcome(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
            outcomes = list(GROUPS[task.group].make(lab, task.seed))
            with replacing(kept, error=SafetyError, setting="output") as temporary:
                temporary.write_text(json.dumps([asdict(outcome) for outcome in outcomes], ensure_ascii=False) + "\n", encoding="utf-8")
    return outcomes


def _key(lab: Lab, task: Task) -> str:
    """What a group's rows depend on: the pair's weights, settings, libraries, and the sources that make them."""
    group = GROUPS[task.group]
    sources = [inspect.getsource(module) for module in (world_module, pair_module)]
    sources += [inspect.getsource(Lab), inspect.getsource(group.make)]
    package = Path(rows.__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        if any(room in (path.stem, path.parent.name) for room in group.rooms):
            sources.append(path.read_text(encoding="utf-8"))
    content = {
        "settings": task.settings.of(*group.settings),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "pair": lab.fingerprint(),
        "sources": sources,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the libraries' progress bars and notices, for many short runs."""
    import datasets
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets.enable_progress_bars()
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
