"""The documentation runs: code blocks are executed, links lead somewhere."""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "kv_retract/**/*.md") for p in ROOT.glob(pattern)
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\((?P<target>[^)\s]+)[^)\n]*\)")


@dataclass(frozen=True)
class Block:
    code: str
    line: int
    """Number of its first line in the page."""
    runs: bool


def python_blocks(text):
    """Blocks tagged `python`; those tagged `python no-run` are only compiled."""
    for match in FENCE.finditer(text):
        words = match["info"].split()
        if words[:1] in (["python"], ["py"]):
            indent = len(match["indent"])
            code = "".join(line[indent:] or "\n" for line in match["body"].splitlines(keepends=True))
            yield Block(code, text[: match.start()].count("\n") + 2, "no-run" not in words)


RUN = [p for p in PAGES if p.parent in (ROOT, ROOT / "docs") and any(python_blocks(p.read_text(encoding="utf-8")))]


def prose(text):
    """The text without code, where what looks like a link is none."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def test_blocks_and_anchors_are_found():
    text = "# A b, c\n```python\nx = 1\n```\n1. step\n   ```python no-run\n   y = x\n\n   z\n   ```\n"
    text += "```bash\nls [a](b)\n```\n"
    assert list(python_blocks(text)) == [Block("x = 1\n", 3, True), Block("y = x\n\nz\n", 7, False)]
    assert anchors(text) == {"a-b-c"}
    assert not LINK.findall(prose(text)) and LINK.findall(prose("see [a](b.md#c)")) == ["b.md#c"]


def test_the_pages_that_run_are_found():
    assert {"README.md", "CONTRIBUTING.md"} <= {name_of(page) for page in RUN}


@pytest.fixture
def registries():
    """Give back the registries as they were: a page may register its own parts."""
    from kv_retract.engine.models import MODELS
    from kv_retract.erasers import ERASERS
    from kv_retract.policies import POLICIES

    kept = [(registry, dict(registry._factories)) for registry in (ERASERS, MODELS, POLICIES)]
    yield
    for registry, factories in kept:
        registry._factories.clear()
        registry._factories.update(factories)


@pytest.mark.parametrize("page", RUN, ids=name_of)
@pytest.mark.usefixtures("registries")
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """Blocks share a namespace per page and run in an empty folder that links to the project's examples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in python_blocks(page.read_text(encoding="utf-8")):
        # Padding makes line numbers in a traceback those of the page.
        source = "\n" * (block.line - 1) + block.code
        code = compile(source, name_of(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if not block.runs else 0)
        if block.runs:
            exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    broken = []
    for match in LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target) if target else page
        if not file.exists():
            broken.append(match["target"])
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(match["target"])
    assert not broken
