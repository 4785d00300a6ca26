"""What a distribution of the project holds, and that its metadata and files agree."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"kv_retract": "kv_retract", "integrations": "kv_retract.integrations", "evals": "kv_retract.evals"}

CUDA = ("nvidia", "cuda", "triton")
"""Beginnings of what a CUDA build of torch pins by itself."""


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def asked_for(extras):
    """Requirements of the project with extras; an extra that names the project itself is followed."""
    texts = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        texts += PROJECT["project"]["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    own = [r for r in found if canonicalize_name(r.name) == "kv-retract"]
    return [r for r in found if r not in own] + [r for o in own for r in asked_for(o.extras)]


def test_every_folder_with_code_is_a_listed_package():
    present = set()
    for folder, name in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            present.add(".".join([name, *inner]))
            assert (path.parent / "__init__.py").exists(), f"{path.parent} needs an __init__.py"
    assert sorted(present) == PROJECT["tool"]["setuptools"]["packages"], "update packages in pyproject.toml"


def test_every_requirement_is_pinned_to_a_version_it_accepts():
    pinned = pins()
    for requirement in asked_for(PROJECT["project"]["optional-dependencies"]):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"add {name} to constraints.txt"
        version = str(pinned[name].specifier).removeprefix("==")
        assert version in requirement.specifier, f"{requirement} refuses the pinned {version}"


def test_requirements_of_requirements_are_pinned_too():
    pinned, missing = pins(), set()
    reached = {canonicalize_name(r.name) for r in asked_for(PROJECT["project"]["optional-dependencies"])}
    todo = sorted(reached)
    while todo:
        name = todo.pop()
        try:
            texts = requires(name) or []
        except ModuleNotFoundError:  # an optional one that is not installed here
            continue
        for requirement in map(Requirement, texts):
            below = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}) or below.startswith(CUDA):
                continue
            if below not in pinned:
                missing.add(f"{below} (for {name})")
            if below not in reached:
                reached.add(below)
                todo.append(below)
    assert not missing


def test_constraints_are_plain_pins():
    for name, requirement in pins().items():
        assert requirement.url is None and not requirement.extras, name
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), f"{name}: {requirement.specifier}"


def test_the_core_needs_no_tensor_library():
    names = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert names == {"numpy", "rich", "typer"}


def test_versions_agree():
    init = (ROOT / "kv_retract" / "__init__.py").read_text(encoding="utf-8")
    written = re.findall(r"__version__ = \"(.+)\"", init)
    assert written in ([], [PROJECT["project"]["version"]])


def test_make_targets_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"demo", "test", "format", "lint", "type", "bench", "coverage", "clean"} <= targets
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in run and (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "kv-retract"
    keep = ["kv_retract", "integrations", "evals"]
    for name in keep:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    out = source.parent / "out"
    # The installed setuptools builds it, so that no index is asked.
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n and not n.endswith("/")}
        info = {n.split(".dist-info/")[1] for n in archive.namelist() if ".dist-info/" in n}
    code = {
        f"{installed.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == code
    data = names - code
    assert {"kv_retract/py.typed", "kv_retract/reference/tokenizer/tokenizer.json"} <= data
    assert "kv_retract/reference/tokenizer/chat_template.jinja" in data
    templates = {f"kv_retract/evals/templates/{p.name}" for p in (ROOT / "evals" / "templates").glob("*")}
    assert templates <= data
    allowed = ("kv_retract/reference/", "kv_retract/evals/templates/", "kv_retract/py.typed")
    assert not [n for n in data if not n.startswith(allowed)]
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= info


@pytest.mark.slow
def test_the_installed_wheel_resolves_the_folders_that_lie_beside_the_package(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys, json; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kv_retract, kv_retract.integrations, kv_retract.evals, kv_retract.reference as r\n"
        "print(json.dumps([kv_retract.__file__, kv_retract.integrations.__file__, kv_retract.evals.__file__,"
        " str(r.TOKENIZER_DIR)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)
    assert all(Path(f).is_relative_to(tmp_path) and Path(f).exists() for f in files), files
