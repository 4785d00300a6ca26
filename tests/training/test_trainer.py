"""The loop: a run that was stopped equals one that was not, bit by bit; schedule, accumulation, log."""

import itertools
import json

import pytest
import torch

from kv_retract.training.checkpoint import CheckpointError, RunFolder
from kv_retract.training.trainer import LoopConfig, rate_at, schedule, train

CONFIG = LoopConfig(steps=12, learning_rate=0.05, warmup=3, log_every=4)


class Task:
    """Learns a linear map from batches that are a function of their number; float32, on the CPU."""

    def __init__(self, path, width=4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.width = width
        self.folder = RunFolder(path, {"width": 4})
        self.begun, self.rates = [], []

    def batch(self, number, rows=16):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(rows, self.width, generator=generator)
        return x, x.sum(1, keepdim=True) / 2

    def batches(self, step, per_step=1):
        self.begun.append(step)
        return map(self.batch, itertools.count(step * per_step))

    def loss(self, batch):
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        return loss, {"loss": float(loss.detach()), "one": 1.0}

    def train(self, config=CONFIG, **options):
        options.setdefault("batches", self.batches)
        return train(
            list(self.model.parameters()), options.pop("batches"), self.loss, config, self.folder,
            state=self.model.state_dict, restore=self.model.load_state_dict, **options,
        )  # fmt: skip

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class Stop(Exception):
    """What ends a run in the middle."""


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Stop

    return progress


# -- stopped and resumed --------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path):
    task = Task(tmp_path / "whole")
    assert task.train() == 12
    return task


def test_training_changes_the_weights_and_the_loss_falls(whole):
    losses = [entry["loss"] for entry in whole.folder.entries()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_run_in_single_steps_equals_an_uninterrupted_one(whole, tmp_path):
    tasks = []
    for done in range(12):
        tasks.append(Task(tmp_path / "run"))
        assert tasks[-1].train(seconds=0.0) == done + 1
    assert torch.equal(tasks[-1].weights, whole.weights)
    assert [task.begun for task in tasks] == [[step] for step in range(12)]


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_run_that_dies_goes_on_from_its_last_state(whole, tmp_path, at):
    saving = LoopConfig(steps=12, learning_rate=0.05, warmup=3, log_every=4, save_seconds=0.0)
    with pytest.raises(Stop):
        Task(tmp_path / "run").train(saving, progress=stop_at(at))  # state: of the step before
    task = Task(tmp_path / "run")
    assert task.train() == 12 and task.begun == [at - 1]
    assert torch.equal(task.weights, whole.weights)


def test_states_between_are_saved_by_time(tmp_path):
    task = Task(tmp_path / "run")
    with pytest.raises(Stop):
        task.train(progress=stop_at(11))
    assert task.folder.load() is None, "not yet: two minutes have not passed"


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    again = Task(tmp_path / "whole")
    log = again.folder.entries()
    assert again.train() == 12
    assert torch.equal(again.weights, whole.weights) and again.folder.entries() == log


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"model": {}, "optimizer": {}, "step": 3},
        {"model": None, "optimizer": None, "step": None},
        {"model": {}, "step": 1},
    ],
)
def test_a_state_of_something_else(tmp_path, state):
    task = Task(tmp_path / "run")
    task.folder.save(state)
    with pytest.raises(CheckpointError, match="(?s)not one of this model.*remove it"):
        task.train()


def test_a_state_of_another_shape(whole, tmp_path):
    with pytest.raises(CheckpointError, match="not one of this model"):
        Task(tmp_path / "whole", width=5).train()


# -- the steps ------------------------------------------------------------------------------------------------------


def test_the_schedule():
    assert [schedule(step, 100, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4, 100, 4) == 1.0 and schedule(0, 100, 0) == 1.0
    assert schedule(52, 100, 4) == pytest.approx(0.03 + 0.97 / 2) and schedule(100, 100, 4) == pytest.approx(0.03)
    falling = [schedule(step, 100, 4) for step in range(3, 101)]
    assert falling == sorted(falling, reverse=True) and min(falling) > 0.02
    assert all(0 < schedule(step, 10, 200) <= 1 for step in range(10)), "all of a short run is warm-up"


def test_restarts_warm_up_and_fall_again():
    config = LoopConfig(steps=30, learning_rate=0.1, warmup=2, restarts=((10, 0.04), (20, 0.02)))
    for first, highest in ((0, 0.1), (10, 0.04), (20, 0.02)):
        for step in range(10):
            assert rate_at(first + step, config) == highest * schedule(step, 10, 2)
    assert rate_at(10, config) == 0.02 and rate_at(9, config) < 0.01, "low at the end of each, half on the first of two"


def test_the_learning_rate_follows_the_schedule(tmp_path):
    """With one weight and a constant slope, AdamW moves by exactly the learning rate."""
    weight = torch.nn.Parameter(torch.zeros(1))
    seen = [0.0]

    def step(batch):
        seen.append(weight.item())
        return weight.sum(), {}

    train(
        [weight], lambda start: itertools.repeat(None), step, LoopConfig(steps=6, learning_rate=0.1, warmup=2),
        RunFolder(tmp_path / "run", {}), state=dict, restore=lambda state: None,
    )  # fmt: skip
    moves = [a - b for a, b in itertools.pairwise([*seen[1:], weight.item()])]
    assert moves == pytest.approx([0.1 * schedule(step, 6, 2) for step in range(6)], rel=1e-4)


def test_only_matrices_decay(tmp_path):
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    train(
        [matrix, vector], lambda start: itertools.repeat(None), lambda b: ((matrix.sum() + vector.sum()) * 0, {}),
        LoopConfig(steps=1, learning_rate=0.1, warmup=0, weight_decay=0.5), RunFolder(tmp_path / "run", {}),
        state=dict, restore=lambda state: None,
    )  # fmt: skip
    assert torch.allclose(matrix, torch.full((2, 2), 0.95)) and torch.equal(vector, torch.ones(2))


def test_accumulated_batches_equal_one_larger_batch(tmp_path):
    config = {"steps": 5, "learning_rate": 0.05, "warmup": 1}
    many, one = Task(tmp_path / "many"), Task(tmp_path / "one")
    many.train(LoopConfig(**config, accumulate=3), batches=lambda step: many.batches(step, per_step=3))

    def larger(step):
        for number in itertools.count(step):
            parts = [one.batch(3 * number + i) for i in range(3)]
            yield tuple(torch.cat(part) for part in zip(*parts, strict=True))

    one.train(LoopConfig(**config), batches=larger)
    assert torch.allclose(many.weights, one.weights, atol=1e-5)
    assert not torch.allclose(many.weights, Task(tmp_path / "fresh").weights, atol=1e-2)


def test_large_gradients_are_clipped(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(1))
    train(
        [weight], lambda start: itertools.repeat(None), lambda b: (weight.sum() * 1e6, {}),
        LoopConfig(steps=1, learning_rate=0.1), RunFolder(tmp_path / "run", {}),
        state=dict, restore=lambda state: None,
    )  # fmt: skip
    state = RunFolder(tmp_path / "run", {}).load()["optimizer"]["state"][0]
    assert float(state["exp_avg"]) == pytest.approx(0.1, rel=1e-3), "a gradient of norm 1"


# -- log, validation, progress --------------------------------------------------------------------------------------


def test_lines_of_the_log_are_means_over_their_steps(tmp_path):
    task, seen = Task(tmp_path / "run"), []

    def batches(step):
        for batch in task.batches(step):
            with torch.no_grad():
                seen.append(float(task.loss(batch)[0]))
            yield batch

    ticks = []
    task.train(batches=batches, progress=lambda done, total: ticks.append((done, total)))
    entries = task.folder.entries()
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    assert all(set(entry) == {"step", "seconds", "loss", "one"} and entry["one"] == 1.0 for entry in entries)
    means = [sum(seen[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [entry["loss"] for entry in entries] == pytest.approx(means, abs=1e-4)
    assert ticks == [(done, 12) for done in range(1, 13)]


def test_means_are_right_after_a_stop_in_between(tmp_path):
    for _ in range(12):
        task = Task(tmp_path / "run")
        task.train(seconds=0.0)
    assert [(entry["step"], entry["one"]) for entry in task.folder.entries()] == [(4, 1.0), (8, 1.0), (12, 1.0)]


def test_validation(tmp_path):
    task = Task(tmp_path / "run")
    task.train(validate=lambda step: {"clean": {"facts": step / 100}}, validate_every=5)
    found = [entry for entry in task.folder.entries() if "clean" in entry]
    assert found == [{"step": step, "clean": {"facts": step / 100}} for step in (5, 10, 12)], "at the end as well"
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["step"] == 4
