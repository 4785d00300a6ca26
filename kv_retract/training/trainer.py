"""The training loop: warm-up and cosine, gradient clipping, checkpoints, a log, the same on CPU and CUDA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from .checkpoint import CheckpointError, RunFolder

Step = Callable[[Any], tuple[torch.Tensor, Mapping[str, float]]]
"""A batch to its loss and numbers for the log, which averages what it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How to optimize."""

    steps: int
    learning_rate: float
    restarts: tuple[tuple[int, float], ...] = ()
    """Steps, in order, from which on warm-up and cosine begin again, each with the learning rate it rises to (warm
    restarts: arXiv 1608.03983)."""
    warmup: int = 200
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    accumulate: int = 1
    """Batches per step."""
    save_seconds: float = 120.0
    log_every: int = 20


def train(
    parameters: list[torch.nn.Parameter],
    batches: Callable[[int], Iterator[Any]],
    step_of: Step,
    config: LoopConfig,
    folder: RunFolder,
    *,
    state: Callable[[], Mapping[str, torch.Tensor]],
    restore: Callable[[Mapping[str, torch.Tensor]], object],
    validate: Callable[[int], Mapping[str, Any]] | None = None,
    validate_every: int = 500,
    stop: Callable[[], bool] = lambda: False,
    seconds: float | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> int:
    """Train until `config.steps`, or until the time is up; resume from the folder's state.

    Args:
        parameters: to optimize. Matrices decay, vectors do not.
        batches: `batches(step)` yields the batches from a step on, `accumulate` per step.
        step_of: see `Step`.
        config: how to optimize.
        folder: where state and log go.
        state: returns what is trained, for the checkpoint.
        restore: takes it back.
        validate: called with the step; what it returns goes into the log.
        validate_every: steps between validations.
        stop: asked at the beginning and after each validation: whether to end before the last step.
        seconds: stop, with a checkpoint, after so long.
        progress: called with steps done and steps in all.

    Returns:
        The steps done so far; `config.steps` when finished.

    Raises:
        CheckpointError: the folder's state is damaged, or that of another model.
    """
    optimizer = _optimizer(parameters, config)
    done = _resume(folder, optimizer, restore)
    started = saved_at = time.monotonic()
    numbers_of: dict[str, list[float]] = {}
    source = batches(done)
    stopped = stop()
    while done < config.steps and not stopped:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, config)
        for _ in range(config.accumulate):
            loss, numbers = step_of(next(source))
            (loss / config.accumulate).backward()
            for name, value in numbers.items():
                numbers_of.setdefault(name, []).append(value)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        progress(done, config.steps)
        if done % config.log_every == 0:
            means = {name: round(fmean(values), 4) for name, values in numbers_of.items()}
            folder.log({"step": done, "seconds": round(time.monotonic() - started, 1), **means})
            numbers_of = {}
        if validate is not None and (done % validate_every == 0 or done == config.steps):
            folder.log({"step": done, **validate(done)})
            stopped = stop()
        out_of_time = seconds is not None and time.monotonic() - started > seconds
        if done == config.steps or stopped or out_of_time or time.monotonic() - saved_at > config.save_seconds:
            folder.save({"model": dict(state()), "optimizer": optimizer.state_dict(), "step": done})
            saved_at = time.monotonic()
        if out_of_time:
            break
    return done


def _optimizer(parameters: list[torch.nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate, betas=config.betas, fused=True,
    )  # fmt: skip


def _resume(
    folder: RunFolder, optimizer: torch.optim.Optimizer, restore: Callable[[Mapping[str, torch.Tensor]], object]
) -> int:
    """Take back the folder's state, where there is one; return the steps done."""
    if (saved := folder.load()) is None:
        return 0
    try:
        restore(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done: int = saved["step"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the state in {str(folder.path)!r} is not one of this model: {error}; remove it to begin anew"
        ) from error
    return done


def rate_at(step: int, config: LoopConfig) -> float:
    """Return the learning rate of a step."""
    cycles = ((0, config.learning_rate), *config.restarts)
    number = max(i for i, (begin, _) in enumerate(cycles) if begin <= step)
    begin, highest = cycles[number]
    end = cycles[number + 1][0] if number + 1 < len(cycles) else config.steps
    return highest * schedule(step - begin, end - begin, config.warmup)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then half a cosine down to 3 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
