"""Work on the corpus in several processes, on the real work of `eval erasers`."""

from dataclasses import replace

import pytest

from kv_retract.errors import EraserMismatchError, UnknownNameError
from kv_retract.evals.erasers import EraserEval, _samples_of
from kv_retract.evals.jobs import families_of, loaded_model, run_jobs
from kv_retract.evals.specs import Spec
from kv_retract.training.families import FAMILIES, HELD_OUT

JOBS = [("preferences", 64), ("needles", 64), ("needles", 80)]


def timeless(parts):
    return [[replace(sample, edit_ms=0.0, next_step_ms=0.0) for sample in part] for part in parts]


def test_the_number_of_processes_changes_nothing(learnt_model, tmp_path):
    settings = EraserEval(out=tmp_path / "never", model=str(learnt_model), n=2, arms=(Spec("mask"), Spec("none")))
    alone = timeless(run_jobs(_samples_of, settings, JOBS, 1))
    assert [(part[0].task, part[0].length, part[0].sample_id[-1]) for part in alone] == [
        (*job, str(number)) for job in JOBS for number in range(2)
    ]
    assert {part[2].leaked for part in alone} == {(True,), (False,)}, "figures that could differ"
    assert timeless(run_jobs(_samples_of, settings, JOBS, 2)) == alone
    assert not (tmp_path / "never").exists()


def test_one_process_works_when_it_is_asked():
    """So progress is told as it is made, and an error ends the work."""
    done = []

    def work(settings, family, length):
        for number in range(2):
            done.append((settings, family, length, number))
            yield done[-1]

    found = run_jobs(work, "s", JOBS[:2], 1)
    assert done == [] and next(found) == ("s", "preferences", 64, 0) and len(done) == 1
    assert [*done, *found] == [("s", *job, number) for job in JOBS[:2] for number in range(2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_jobs_are_no_work(workers):
    assert list(run_jobs(_samples_of, None, [], workers)) == []


def test_errors_of_the_work_reach_the_caller(learnt_model, make_eraser, tmp_path):
    arms = (Spec("kveraser", {"path": str(make_eraser("kv_map"))}),)  # of another model
    settings = EraserEval(out=tmp_path / "never", model=str(learnt_model), n=1, arms=arms)
    with pytest.raises(EraserMismatchError, match="kv-retract train eraser"):
        list(run_jobs(_samples_of, settings, JOBS, 1))


def test_families():
    assert families_of(("updates", "facts"), "test") == ("updates", "facts"), "in the order of the caller"
    assert families_of((), "test") == tuple(FAMILIES.names()) and HELD_OUT in families_of((), "test")
    assert set(families_of((), "test")) - set(families_of((), "train")) == {HELD_OUT}


@pytest.mark.parametrize("split", ["train", "test"])
def test_unknown_families_are_told_with_the_known_ones(split):
    with pytest.raises(UnknownNameError, match="unknown task family 'nope'; known: .*facts.*updates"):
        families_of(("facts", "nope"), split)


def test_a_model_is_loaded_once(learnt_model):
    first = loaded_model(str(learnt_model), "cpu", "float32")
    assert loaded_model(str(learnt_model), "cpu", "float32") is first and first.name == "learnt"
    assert str(loaded_model(str(learnt_model), "cpu", "bfloat16").model.dtype) == "torch.bfloat16"
    with pytest.raises(UnknownNameError, match="a registered model"):
        loaded_model("nope", "cpu", "float32")
