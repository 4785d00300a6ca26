"""Evaluations on the corpus: what each must be told, its work in several processes, its results folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kv_retract.errors import KVRetractError
from kv_retract.ledger.render import Renderer

from .machine import describe_machine, versions
from .progress import Progress, silent
from .results import results_folder, write_json, write_jsonl

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import LoadedModel
    from kv_retract.training.samples import CorpusSample

T = TypeVar("T")
Job = tuple[str, int]
"""Family and length."""
MARGIN = 512
"""Tokens that a trace may be longer than asked for, its question and answer included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEval:
    """What every evaluation on the corpus must be told."""

    out: Path
    model: str = "reference"
    n: int
    """Traces per job."""
    split: str = "test"
    seed: int = 0
    """Of the first trace; the next ones count up."""
    device: str = "cpu"
    dtype: str = "float32"
    workers: int = 1
    """Processes; each takes whole jobs, and a share of the cores. What they find does not depend on it."""


def evaluate(
    settings: CorpusEval,
    work: Callable[[Any, str, int], Iterator[list[T]]],
    jobs: Sequence[Job],
    *,
    about: Mapping[str, Any],
    summarise: Callable[[list[T]], Mapping[str, Any]],
    record: Callable[[T], Mapping[str, Any]],
    files: Callable[[Mapping[str, Any]], Mapping[str, bytes]] = lambda metrics: {},
    progress: Progress = silent,
) -> dict[str, Any]:
    """Do the jobs and write a results folder: `config.json`, `samples.jsonl`, `metrics.json`; return the metrics.

    Args:
        settings: of the evaluation.
        work: yields the samples of each trace of a job; see `run_jobs`.
        jobs: what to do.
        about: what the configuration tells beside the settings that all evaluations have.
        summarise: all samples to what the metrics hold beside the configuration.
        record: a sample to its line in `samples.jsonl`.
        files: the metrics to further files, by name.
        progress: called with traces done and traces in all.

    Raises:
        OutputExistsError: the results folder is there already.
        UnknownNameError: the model has no such name.
    """
    started = time.perf_counter()
    with results_folder(settings.out) as folder:
        loaded = loaded_model(settings.model, settings.device, settings.dtype)
        samples: list[T] = []
        for done, part in enumerate(run_jobs(work, settings, jobs, settings.workers), start=1):
            samples += part
            progress(done, settings.n * len(jobs))
        config = {
            "model": loaded.name,
            "num_parameters": loaded.model.num_parameters(),
            **about,
            "n": settings.n,
            "split": settings.split,
            "seed": settings.seed,
            "dtype": settings.dtype,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 1),
            "machine": describe_machine(settings.device),
            "versions": versions(),
        }
        metrics = {"config": config, **summarise(samples)}
        write_json(folder / "config.json", config)
        write_jsonl(folder / "samples.jsonl", map(record, samples))
        write_json(folder / "metrics.json", metrics)
        for name, content in files(metrics).items():
            (folder / name).write_bytes(content)
    return metrics


def engine_of(settings: CorpusEval, max_tokens: int) -> tuple[HFEngine, Renderer]:
    """Return an engine with an empty pool, and the renderer, of the model of an evaluation."""
    from kv_retract.engine.hf import HFEngine

    loaded = loaded_model(settings.model, settings.device, settings.dtype)
    return HFEngine(loaded.model, max_tokens=max_tokens, name=loaded.name), Renderer(loaded.tokenizer)


def traces(settings: CorpusEval, family: str, **options: Any) -> Iterator[tuple[int, CorpusSample]]:
    """Yield the traces of a job with their numbers; options as for `training.corpus.generate`."""
    from kv_retract.training.corpus import samples
    from kv_retract.training.encoding import RowEncoder

    tokens = RowEncoder(loaded_model(settings.model, settings.device, settings.dtype).tokenizer).length
    made = samples(family, settings.n, seed=settings.seed, split=settings.split, tokens=tokens, mentions=1.0, **options)
    return enumerate(made)


def run_jobs(
    work: Callable[[Any, str, int], Iterator[T]], settings: Any, jobs: Sequence[Job], workers: int
) -> Iterator[T]:
    """Yield what `work(settings, family, length)` yields, in the order of jobs whatever the number of processes.

    Args:
        work: a function of a module, so that a process finds it.
        settings: whatever it takes; must be picklable.
        jobs: what to do.
        workers: processes; each takes whole jobs, and a share of the cores.
    """
    if workers == 1 or not jobs:
        for job in jobs:
            yield from work(settings, *job)
        return
    # Not forked: the threads of torch do not survive that.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for part in pool.map(_whole_job, repeat(work), repeat(settings), repeat(workers), *zip(*jobs, strict=True)):
            yield from part


def families_of(names: Sequence[str], split: str) -> tuple[str, ...]:
    """Return the named families, or all that a split has.

    Raises:
        UnknownNameError: a family has no such name.
    """
    from kv_retract.training.corpus import training_families
    from kv_retract.training.families import FAMILIES

    for name in names:
        FAMILIES.factory(name)
    return tuple(names) or tuple(training_families() if split == "train" else FAMILIES.names())


class LengthError(KVRetractError, ValueError):
    """Traces of the length that is asked for do not fit into the model."""


def check_lengths(model: str, device: str, dtype: str, lengths: Sequence[int]) -> None:
    """Raise LengthError where traces of a length, with a question behind them, have more tokens than positions."""
    most: int = loaded_model(model, device, dtype).model.config.max_position_embeddings
    if (longest := max(lengths)) + MARGIN > most:
        raise LengthError(
            f"model {model!r} has {most} positions, traces of {longest} tokens need {longest + MARGIN}; pass a smaller "
            "--length"
        )


@cache
def loaded_model(name: str, device: str, dtype: str) -> LoadedModel:
    """Load a model once in a process that does several jobs."""
    from kv_retract.engine.models import load_model

    return load_model(name, device=device, dtype=dtype)


def _whole_job(
    work: Callable[[Any, str, int], Iterator[T]], settings: Any, workers: int, family: str, length: int
) -> list[T]:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    return list(work(settings, family, length))
