"""The benchmark of the prefix index on a few threads: what it counts, and that indexes which disagree are found."""

import itertools
import json
import sys

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kv_retract.cache.naive import NaiveCache
from kv_retract.cli import app
from kv_retract.evals import radix_cores as cores
from kv_retract.evals import radix_workload as loads
from kv_retract.evals.bench import BenchSettingError
from kv_retract.evals.bench_console import print_radix
from kv_retract.evals.radix import RadixBench, RadixBenchError, bench_radix
from kv_retract.evals.radix_cores import FLOOR, OURS, CoresDisagreeError, Ours, measure, run_core
from kv_retract.evals.radix_workload import Step, Workload, make_workload
from kv_retract.evals.results import dump

THREADS = 10


class Slow(Ours):
    """The oracle in place of the tree; its slots are read in a call of its own."""

    gathers = True

    def __init__(self, page_size):
        index = NaiveCache(page_size)
        self.lookup, self.insert = index.match_prefix, index.insert


class Short(Ours):
    """Finds one entry less than there is."""

    def gather(self, found):
        return found.slots[:-1]


@pytest.fixture(scope="module")
def document():
    ticks = []
    found = bench_radix(RadixBench(threads=THREADS, repeats=2), progress=lambda *step: ticks.append(step))
    assert ticks == [(1, 3), (2, 3), (3, 3)], "a warm-up and two repetitions"
    return found


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Collecting the garbage of a process that runs many tests takes longer than these runs; `document` does it."""
    monkeypatch.setattr(cores, "_undisturbed", lambda run: run())


@pytest.fixture
def short_threads(monkeypatch):
    """Threads for the oracle: of few tokens, and of few different ones, so that paths also part inside of nodes."""
    sizes = {"SYSTEM_TOKENS": (7, 20), "DOCUMENT_TOKENS": (2, 15), "TURN_TOKENS": (1, 9), "_VOCABULARY": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(loads, name, value)


# -- the workload ---------------------------------------------------------------------------------------------------


def test_threads_are_a_function_of_the_seed():
    first, again, other = (make_workload(THREADS, seed) for seed in (0, 0, 1))
    assert first.steps == again.steps != other.steps
    assert all(np.array_equal(a, b) for a, b in zip(first.ids, again.ids, strict=True))
    assert len(first.ids) == THREADS and first.ids[0].dtype == np.int64


def test_every_thread_takes_its_turns_in_order_between_those_of_others():
    load = make_workload(200, 3)
    for thread, steps in itertools.groupby(sorted(load.steps), key=lambda step: step.thread):
        ends = [end for _, asked, last in steps for end in (asked, last)]
        assert ends[-1] == len(load.ids[thread]) and loads.TURNS[0] <= len(ends) / 2 <= loads.TURNS[1]
        grown = np.diff(ends)
        assert grown.min() >= loads.TURN_TOKENS[0] and grown.max() <= loads.TURN_TOKENS[1]
    changes = sum(a.thread != b.thread for a, b in itertools.pairwise(load.steps))
    assert changes > 0.9 * len(load.steps)
    begun = list(dict.fromkeys(step.thread for step in load.steps))
    place = {thread: number for number, thread in enumerate(begun)}
    assert all(abs(place[thread] - thread) < 3 * loads.AT_WORK for thread in begun)


def test_prefixes_are_shared():
    load = make_workload(50, 0)
    shortest = min(loads.SYSTEM_TOKENS)
    assert len({ids[:shortest].tobytes() for ids in load.ids}) <= loads.SYSTEMS
    facts = measure(load, {OURS: Ours}, page_size=1, repeats=1)["workload"]
    assert facts["hit_rate"] > 0.7 and 0.2 < facts["shared_fraction"] < 1


# -- what is counted ------------------------------------------------------------------------------------------------


def test_the_document_says_what_was_measured(document):
    assert set(document) == {
        "cores", "floor", "ratio_to", "workload", "page", "repeats", "seed", "started_at", "machine", "versions"
    }  # fmt: skip
    assert [document[key] for key in ("page", "repeats", "seed")] == [1, 2, 0]
    assert list(document["cores"]) == [OURS] and list(document["ratio_to"]) == [FLOOR]
    columns = {"match_us", "match_s", "insert_us", "insert_s"}
    for row in (document["cores"][OURS], document["floor"]):
        assert set(row) == columns
        assert all(row[name]["n"] == 2 and row[name]["minimum"] > 0 for name in columns)
    assert set(document["ratio_to"][FLOOR]) == {"match", "insert"}
    assert document["versions"]["numpy"] and document["machine"]["device"] == "cpu"
    assert json.loads(dump(document)) == json.loads(json.dumps(document))


def test_facts_of_the_workload(short_threads):
    load = make_workload(40, 0)
    facts = measure(load, {OURS: Ours}, page_size=1, repeats=1)["workload"]
    assert facts["threads"] == 40 and facts["calls"] == 2 * len(load.steps)
    assert facts["tokens_asked"] == sum(step.asked for step in load.steps)
    assert facts["tokens_inserted"] == sum(step.end for step in load.steps)
    assert facts["tokens_of_threads"] == sum(map(len, load.ids))
    held = len({ids[:end].tobytes() for ids in load.ids for end in range(1, len(ids) + 1)})
    assert facts["tokens_held"] == held
    assert facts["shared_fraction"] == pytest.approx(1 - held / facts["tokens_of_threads"])
    matched = sum(found for found, _, _ in run_core(Ours(1), load).results)
    assert facts["hit_rate"] == pytest.approx(matched / facts["tokens_asked"])


def test_a_step_by_hand(monkeypatch):
    """Two threads that share two tokens; by a scripted clock a call takes 1, 2 and 4 us."""
    readings = itertools.accumulate(itertools.cycle([0, 1000, 2000, 0, 4000]))
    monkeypatch.setattr(cores.time, "perf_counter_ns", lambda: next(readings))
    threads = [np.array([5, 6, 7, 8]), np.array([5, 6, 9, 9])]
    load = Workload(threads, [Step(0, 3, 4), Step(1, 3, 4), Step(0, 4, 4)])
    run = run_core(Slow(1), load)
    assert run.results == [(0, 0, 0), (2, 0 + 1, 2), (4, 0 + 1 + 2 + 3, 4)]
    assert run.times == {"match": [3000] * 3, "lookup": [1000] * 3, "insert": [4000] * 3}
    assert run_core(Ours(1), load).times["lookup"] == []


def test_ratios_are_ours_over_theirs(monkeypatch):
    told = {
        "times": {
            OURS: {"match_s": [1.0, 2.0, 9.0], "insert_s": [3.0, 3.0, 3.0]},
            "other": {"match_s": [2.0, 2.0, 2.0], "lookup_s": [4.0, 4.0, 4.0], "insert_s": [6.0, 1.0, 6.0]},
            FLOOR: {"match_s": [0.5, 0.5, 0.5], "insert_s": [1.0, 1.0, 1.0]},
        },
        "workload": {},
    }
    monkeypatch.setattr("kv_retract.evals.radix.measure", lambda *args, **kw: told)
    found = bench_radix(RadixBench())
    assert found["ratio_to"]["other"] == {"match": 1.0, "lookup": 0.5, "insert": 0.5}
    assert found["ratio_to"][FLOOR] == {"match": 4.0, "insert": 3.0}
    assert found["cores"]["other"]["match_s"]["median"] == 2.0


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_order_turns_and_the_oracle_agrees(page_size, short_threads):
    order = []

    def noting(name, kind):
        def make(size):
            order.append(name)
            return kind(size)

        return make

    found = measure(
        make_workload(8, 0), {OURS: noting("a", Ours), "slow": noting("b", Slow)}, page_size=page_size, repeats=2
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(row["match_s"]) for name, row in found["times"].items()} == {OURS: 2, "slow": 2, FLOOR: 2}
    assert "lookup_s" in found["times"]["slow"] and "lookup_s" not in found["times"][OURS]


def test_indexes_that_disagree_are_an_error():
    with pytest.raises(CoresDisagreeError, match="step .*'short' matched"):
        measure(make_workload(5, 0), {OURS: Ours, "short": Short}, page_size=1, repeats=1)


@pytest.mark.parametrize("settings", [{"threads": 0}, {"repeats": 0}, {"page": 0}])
def test_settings_without_anything_to_do(settings):
    with pytest.raises(BenchSettingError, match="expected at least one thread"):
        bench_radix(RadixBench(**settings))


# -- another environment --------------------------------------------------------------------------------------------


@pytest.fixture
def make_venv(tmp_path):
    """An environment whose Python is a script in this one's: it sees the arguments that it is called with."""

    def make(script):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir()
        python.write_text(f"#!{sys.executable}\n{script}\n")
        python.chmod(0o755)
        return tmp_path

    return make


def test_the_program_in_another_environment(make_venv):
    venv = make_venv(
        "import sys\nfrom kv_retract.evals import radix_cores as cores\n"
        "assert sys.argv[1:3] == ['-m', 'kv_retract.evals.radix_cores']\ndel sys.argv[1:3]\n"
        "cores.SGLANG, cores.version = (), lambda name: '9.9'\nprint('something else')\ncores.main()"
    )
    ticks = []
    found = bench_radix(
        RadixBench(threads=4, repeats=1, page=16, venv=venv), progress=lambda *step: ticks.append(step)
    )  # fmt: skip
    assert ticks == [(1, 2), (2, 2)] and found["page"] == 16
    assert found["workload"]["threads"] == 4 and found["cores"][OURS]["match_s"]["n"] == 1
    assert found["versions"]["sglang"] == "9.9" and "numpy" in found["versions"]


def test_an_environment_that_is_not_there(tmp_path):
    with pytest.raises(RadixBenchError, match="expected an environment with SGLang and kv-retract, found no"):
        bench_radix(RadixBench(venv=tmp_path))


@pytest.mark.parametrize(
    "script", ["import sys\nsys.exit('no tree here')", "print('nothing', file=__import__('sys').stderr)"]
)
def test_a_program_that_fails_is_told(make_venv, script):
    with pytest.raises(RadixBenchError, match="failed: (no tree here|nothing)"):
        bench_radix(RadixBench(threads=1, repeats=1, venv=make_venv(script)))


# -- what is shown --------------------------------------------------------------------------------------------------


def test_tables(document):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    shown = {**document, "cores": {**document["cores"], "other [x]": document["cores"][OURS]}}
    shown["ratio_to"] = {"other [x]": {"match": 0.25, "lookup": 0.5, "insert": 0.125}, **document["ratio_to"]}
    print_radix(shown, console)
    text = console.export_text()
    assert f"{THREADS} threads" in text and "pages of 1" in text
    for told in (OURS, "other [x]", FLOOR, "0.250", "0.500", "0.125"):
        assert told in text


def test_the_command(tmp_path):
    out = tmp_path / "radix.json"
    options = ["bench", "radix", "--threads", "2", "--repeats", "1", "--page", "16", "--seed", "4"]
    done = CliRunner().invoke(app, [*options, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told == json.loads(out.read_text())
    assert (told["page"], told["seed"], told["workload"]["threads"]) == (16, 4, 2)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0 and "kv_retract" in done.output
