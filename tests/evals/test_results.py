import json
import math

import numpy as np
import pytest

from kv_retract.errors import OutputExistsError
from kv_retract.evals.results import (
    OutputError,
    check_free,
    check_new,
    dump,
    results_folder,
    write_json,
    write_jsonl,
    write_new_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with results_folder(out) as draft:
        (draft / "x").write_text("1")
        assert draft.parent == out.parent and not out.exists()
    assert (out / "x").read_text() == "1" and names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), results_folder(tmp_path / "out") as draft:
        (draft / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def occupy(path, how):
    match how:
        case "file":
            path.write_text("kept")
        case "folder":
            path.mkdir()
            (path / "kept").touch()
        case "link":
            (path.parent / "elsewhere").mkdir()
            path.symlink_to(path.parent / "elsewhere")
        case "dangling":
            path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("how", ["file", "folder", "link", "dangling"])
def test_what_is_there_stays(tmp_path, how):
    out = tmp_path / "out"
    occupy(out, how)
    before = names(tmp_path)
    with pytest.raises(OutputExistsError, match=r"out' is there already.*choose another place"):
        with results_folder(out):
            pytest.fail("the work must not begin")
    with pytest.raises(OutputExistsError):
        check_new(out)
    with pytest.raises(OutputExistsError):
        write_new_json(out, 1)
    assert names(tmp_path) == before
    assert how != "file" or out.read_text() == "kept"


def test_an_empty_folder_is_free_for_a_folder_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    check_free(out)
    with pytest.raises(OutputExistsError):
        check_new(out)
    with results_folder(out) as draft:
        (draft / "x").touch()
    assert names(out) == ["x"]


def test_what_appears_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), results_folder(out) as draft:
        (draft / "mine").touch()
        out.mkdir()
        (out / "theirs").touch()
    assert names(out) == ["theirs"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("write", [write_new_json, lambda out, _: results_folder(out).__enter__()])
@pytest.mark.parametrize("place", ["file/out", "n" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path, write, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write results to .*(file/out|nnn)'.*choose another place"):
        write(tmp_path / place, {})
    assert names(tmp_path) == ["file"]


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_dump_is_strict_json_in_ascii():
    value = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": (True, None, 3), 4: "é\ud800\u202e", "d": {}}
    text = dump(value)
    assert text.isascii() and "\n" not in text
    assert strictly(text) == {
        "a": None, "b": ["Infinity", "-Infinity", 1.5], "c": [True, None, 3], "4": "é\ud800\u202e", "d": {}
    }  # fmt: skip
    assert strictly(dump(np.float64(math.nan))) is None


def test_files_of_json(tmp_path):
    rows = [{"kl": math.nan}, {"kl": 1.0, "text": "two\nlines"}]
    write_jsonl(tmp_path / "rows", rows)
    lines = (tmp_path / "rows").read_text().splitlines()
    assert [strictly(line) for line in lines] == [{"kl": None}, rows[1]]
    for write, name in ((write_json, "a"), (write_new_json, "new/b")):
        write(tmp_path / name, {"x": math.inf})
        assert strictly((tmp_path / name).read_text()) == {"x": "Infinity"}
