"""Who may import whom, read from the source of every module."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {"kv_retract": "kv_retract", "integrations": "kv_retract.integrations", "evals": "kv_retract.evals"}
"""Source folder -> the name under which it is installed."""

LEAVES = {"types", "errors", "registry"}
TEXT = {"spans", "placing", "ledger", "trace", "policies", "planner"}
TENSORS = {"hooks", "cache", "erasers", "landmarks", "engine", "kernels", "reference"}
STEP = {
    "session", "thread", "threads", "bookkeeping", "streaming", "answer", "edits", "events", "watch", "healing",
    "audit", "logs", "attention",
}  # fmt: skip
LIBRARY = LEAVES | TEXT | TENSORS | STEP

MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "registry": {"errors"},
    "reference": set(),
    "kernels": LEAVES,
    "spans": LEAVES,
    "placing": LEAVES | {"spans"},
    "ledger": LEAVES | {"spans"},
    "trace": LEAVES | {"ledger"},
    "policies": LEAVES | {"spans", "ledger"},
    "planner": LEAVES | {"spans", "placing", "ledger", "policies"},
    "cache": LEAVES | {"kernels"},
    "hooks": set(),
    "erasers": LEAVES | {"hooks", "cache", "kernels"},
    "landmarks": LEAVES | {"hooks", "cache"},
    "engine": LEAVES | {"cache", "landmarks", "kernels", "reference"},
    **{name: LIBRARY for name in STEP},
    "__init__": LIBRARY,
    "training": LEAVES | TENSORS | {"ledger", "trace"},
    "testing": LIBRARY,
    "integrations": LIBRARY,
    "evals": LIBRARY | {"training", "integrations"},
    "cli": LIBRARY | {"evals", "training", "integrations"},
}
"""Part of the package -> the other parts it may import. Nothing may import testing, only the command line may import
evals, and only evals and the command line may import training and integrations."""

EXCEPTIONS: dict[str, set[str]] = {}
"""Single files that may import more than their part; say why."""

TORCH_FREE = LEAVES | TEXT | {"__init__", "cli", "events", "audit", "logs"}
"""Parts that load without torch: an import under TYPE_CHECKING or inside of a function does not count."""
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "langchain",
    "langchain_core",
    "langgraph",
    "sglang",
    "opentelemetry",
    "prometheus_client",
    "matplotlib",
    "scipy",
}

FRAMEWORKS = {
    "langchain": {"langchain", "langchain_core", "langgraph"},
    "langgraph": {"langgraph", "langchain_core"},
    "opentelemetry": {"opentelemetry"},
    "prometheus": {"prometheus_client"},
    "sglang": {"sglang", "prometheus_client"},
}
"""Folder of integrations -> the framework it may import; LangChain's agents are LangGraph graphs."""

READS_ENVIRONMENT = "integrations/sglang/config.py"
"""What a server is told reaches all of its processes through the environment."""
MAX_LINES = 400


@dataclass(frozen=True)
class Import:
    name: str
    """Absolute dotted name."""
    line: int
    at_load: bool
    """It runs when the module is loaded: neither in a function nor under TYPE_CHECKING."""


@dataclass(frozen=True)
class Module:
    path: str
    """Relative to the project."""
    name: str
    imports: tuple[Import, ...]

    @property
    def part(self):
        return (self.name.split(".") + ["__init__"])[1]


class Imports(ast.NodeVisitor):
    def __init__(self, package):
        self.package = package
        self.found = []
        self.depth = 0

    def visit_Import(self, node):
        self.found += [Import(alias.name, node.lineno, not self.depth) for alias in node.names]

    def visit_ImportFrom(self, node):
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        name = ".".join([*base, *([node.module] if node.module else [])])
        # `from . import x` and `from kv_retract import x` may name modules or values.
        names = [f"{name}.{a.name}" for a in node.names] if name in ("kv_retract", ".".join(base)) else [name]
        self.found += [Import(n, node.lineno, not self.depth) for n in names]

    def visit_If(self, node):
        hidden = ast.unparse(node.test).endswith("TYPE_CHECKING")
        self.depth += hidden
        for child in node.body:
            self.visit(child)
        self.depth -= hidden
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef


def parse(source, name, *, package):
    visitor = Imports(name.split(".") if package else name.split(".")[:-1])
    visitor.visit(ast.parse(source))
    return tuple(visitor.found)


@cache
def modules():
    found = []
    for folder, installed in SHIPPED.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            package = inner[-1] == "__init__"
            name = ".".join([installed, *(inner[:-1] if package else inner)])
            imports = parse(path.read_text(encoding="utf-8"), name, package=package)
            found.append(Module(path.relative_to(ROOT).as_posix(), name, imports))
    return found


def part_of(imported):
    """Part of kv_retract that a dotted name belongs to; None for the names that its __init__ exports."""
    part = imported.split(".")[1]
    return part if part in MAY_IMPORT and part != "__init__" else None


def test_the_reader_sees_every_kind_of_import():
    source = (
        "import torch.nn\nfrom ..types import Span\nfrom . import base\nfrom kv_retract import planner\n"
        "if TYPE_CHECKING:\n    import numpy\nelse:\n    import scipy\n"
        "class A:\n    import json\n    def f(self):\n        from .mask import M\n"
    )
    found = [(i.name, i.at_load) for i in parse(source, "kv_retract.erasers.none", package=False)]
    assert found == [
        ("torch.nn", True),
        ("kv_retract.types", True),
        ("kv_retract.erasers.base", True),
        ("kv_retract.planner", True),
        ("numpy", False),
        ("scipy", True),
        ("json", True),
        ("kv_retract.erasers.mask", False),
    ]


def test_every_part_has_a_rule():
    parts = {module.part for module in modules()}
    assert parts <= MAY_IMPORT.keys(), f"add to MAY_IMPORT what {sorted(parts - MAY_IMPORT.keys())} may import"
    assert {"types", "cache", "erasers", "engine", "policies", "session"} <= parts


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_it_may(part):
    wrong = []
    for module in (m for m in modules() if m.part == part):
        allowed = MAY_IMPORT[part] | {part} | EXCEPTIONS.get(module.path, set())
        wrong += [
            f"{module.path}:{i.line} imports {i.name}"
            for i in module.imports
            if i.name.startswith("kv_retract.") and part_of(i.name) and part_of(i.name) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_imports_evals_only_when_asked_to_run_them():
    eager = [i for m in modules() if m.part == "cli" for i in m.imports if i.at_load and ".evals" in i.name]
    assert not eager


def test_nothing_imports_tests_examples_or_uninstalled_names():
    wrong = [
        f"{m.path}:{i.line} imports {i.name}"
        for m in modules()
        for i in m.imports
        if i.name.split(".")[0] in {"tests", "examples", "evals", "integrations"}
    ]
    assert not wrong, "\n".join(wrong)


def test_text_parts_load_no_tensor_library_and_no_framework():
    wrong = [
        f"{m.path}:{i.line} imports {i.name}"
        for m in modules()
        if m.part in TORCH_FREE
        for i in m.imports
        if i.at_load and i.name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_an_integration_imports_one_framework():
    everything = set().union(*FRAMEWORKS.values())
    wrong = []
    for module in (m for m in modules() if m.part == "integrations"):
        folder = (module.name.split(".") + [""])[2]
        others = everything - FRAMEWORKS.get(folder, set())
        wrong += [f"{module.path}:{i.line} imports {i.name}" for i in module.imports if i.name.split(".")[0] in others]
    assert not wrong, "\n".join(wrong)


def test_one_file_may_read_the_environment():
    readers = []
    for module in modules():
        for node in ast.walk(ast.parse((ROOT / module.path).read_text(encoding="utf-8"))):
            named = (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}) or (
                isinstance(node, ast.ImportFrom) and any(a.name in {"environ", "getenv"} for a in node.names)
            )
            if named and module.path != READS_ENVIRONMENT:
                readers.append(f"{module.path}:{node.lineno}")
    assert not readers, "\n".join(readers)


def test_no_file_is_longer_than_it_should_be():
    lengths = {m.path: len((ROOT / m.path).read_text(encoding="utf-8").splitlines()) for m in modules()}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


@pytest.mark.parametrize("name", ["kv_retract", "kv_retract.policies", "kv_retract.planner", "kv_retract.trace"])
def test_importing_loads_neither_torch_nor_a_framework(name):
    heavy = sorted(HEAVY)
    code = f"import sys, {name}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
