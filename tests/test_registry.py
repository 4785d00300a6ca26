"""Registries: names to factories, from decorators and from the entry points of other distributions."""

import importlib
import textwrap
from dataclasses import dataclass

import pytest

from kv_retract.errors import DuplicateNameError, PluginError, UnknownNameError
from kv_retract.policies.base import POLICIES
from kv_retract.registry import Registry

GROUP = "kv_retract.test_shapes"


@dataclass(kw_only=True)
class Square:
    side: int = 1


@pytest.fixture
def shapes():
    registry = Registry("shape", GROUP)
    registry.register("square")(Square)
    return registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a distribution as an installer would, and put it on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(distribution, group=GROUP, *, modules=(), **entries):
        for name, source in dict(modules).items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()

    return write


# -- by decorator ---------------------------------------------------------------------------------------------------


def test_a_registered_factory_builds_a_new_instance_each_time(shapes):
    first, second = shapes.create("square", side=2), shapes.create("square", side=2)
    assert first == Square(side=2) and first is not second
    assert shapes.factory("square") is Square
    assert shapes.names() == ["square"]


def test_the_decorator_returns_what_it_decorates_and_functions_are_factories_too(shapes):
    def unit():
        return Square(side=1)

    assert shapes.register("unit")(unit) is unit
    assert shapes.create("unit") == Square()
    assert shapes.names() == ["square", "unit"]


def test_a_name_is_taken_once(shapes):
    class Other:
        pass

    with pytest.raises(DuplicateNameError, match="shape 'square' is registered already, by .*Square"):
        shapes.register("square")(Other)
    assert shapes.factory("square") is Square
    assert shapes.register("square")(Square) is Square, "again by the same module is no conflict"


def test_an_unknown_name_lists_those_that_are_known(shapes):
    shapes.register("circle")(lambda: None)
    with pytest.raises(UnknownNameError, match="^unknown shape 'squar'; known: circle, square$") as caught:
        shapes.create("squar")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownNameError, match="known: none$"):
        Registry("shape", "kv_retract.empty").factory("any")


def test_wrong_parameters_are_named(shapes):
    with pytest.raises(ValueError, match=r"shape 'square' does not take \{'edge': 3\}: .*edge"):
        shapes.create("square", edge=3)


# -- by entry point -------------------------------------------------------------------------------------------------


def test_entry_points_of_other_distributions_are_found_and_loaded_when_used(install, shapes):
    install(
        "shapes-of-others",
        modules={"others": "class Circle:\n    def __init__(self, *, radius=1):\n        self.radius = radius\n"},
        circle="others:Circle",
    )
    assert shapes.names() == ["circle", "square"]
    assert shapes.create("circle", radius=4).radius == 4
    assert shapes.factory("circle").__module__ == "others"


def test_other_groups_are_left_alone(install, shapes):
    install("elsewhere", "kv_retract.test_colours", modules={"colours": "red = dict"}, red="colours:red")
    assert shapes.names() == ["square"]


def test_nothing_is_imported_before_it_is_used(install, shapes):
    install("loud", modules={"loud": "raise SystemExit('imported')"}, loud="loud:Loud")
    assert shapes.names() == ["loud", "square"]
    assert shapes.create("square") == Square()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("raise RuntimeError('needs a GPU')", "RuntimeError: needs a GPU"),
        ("def f(:", "SyntaxError: .*"),
        ("", "AttributeError: .*no attribute 'Broken'"),
    ],
)
def test_a_broken_plugin_says_whose_it_is_and_does_not_break_the_others(install, shapes, tmp_path, source, error):
    module = f"broken_{tmp_path.name.replace('-', '_')}"
    good = f"good_{tmp_path.name.replace('-', '_')}"
    install("broken-shapes", modules={module: source}, broken=f"{module}:Broken")
    install("good-shapes", modules={good: "Good = dict"}, good=f"{good}:Good")
    expected = f"shape 'broken' of broken-shapes cannot be imported from '{module}:Broken': {error}.*repair or uninst"
    with pytest.raises(PluginError, match=expected) as caught:
        shapes.create("broken")
    assert isinstance(caught.value, ImportError) and caught.value.__cause__ is not None
    assert shapes.create("good", a=1) == {"a": 1}
    assert shapes.names() == ["broken", "good", "square"]
    with pytest.raises(UnknownNameError, match="known: broken, good, square$"):
        shapes.create("goood")


def test_what_is_registered_here_goes_before_an_entry_point_of_the_same_name(install, shapes):
    install("impostor", modules={"impostor": "Square = dict"}, square="impostor:Square")
    assert shapes.factory("square") is Square and shapes.names() == ["square"]


def test_a_policy_of_another_distribution_is_one_of_ours(install):
    install(
        "my-policies",
        POLICIES.group,
        modules={
            "my_policies": """
                from dataclasses import dataclass
                from kv_retract import RetractionPolicy

                @dataclass(kw_only=True)
                class Never(RetractionPolicy):
                    name = "never"

                    def propose(self, ctx):
                        return []
            """
        },
        never="my_policies:Never",
    )
    fresh = Registry(POLICIES.kind, POLICIES.group)  # entry points are read once: not by the one the process shares
    assert fresh.names() == ["never"]
    assert fresh.create("never").propose(None) == []
