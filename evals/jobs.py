"""Work on the corpus in several processes: one job per family and length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from kv_retract.errors import KVRetractError

if TYPE_CHECKING:
    from kv_retract.engine.models import LoadedModel

T = TypeVar("T")
Job = tuple[str, int]
"""Family and length."""
MARGIN = 512
"""Tokens that a trace may be longer than asked for, its question and answer included."""


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
