"""The bundled erasers of the bundled model: they belong to it, and they do what they were trained for."""

import json

import pytest

from kv_retract.engine.models import load_model
from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers.kveraser import VARIANTS, KVEraserEraser
from kv_retract.erasers.kveraser.eraser import SHIPPED
from kv_retract.evals.erasers import EraserEval, eval_erasers
from kv_retract.evals.specs import Spec

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_the_folder_of_a_variant(variant):
    folder = SHIPPED / variant
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    runs = ("", "further-", "third-", "fourth-", "fifth-") if variant == "kv_map" else ("",)
    training = {f"training/{run}{name}" for run in runs for name in ("config.json", "log.jsonl", "loss.svg")}
    assert names == {"config.json", "eraser.safetensors"} | training
    assert (folder / "eraser.safetensors").stat().st_size < 4e6
    assert json.loads((folder / "training" / "config.json").read_text())["variant"] == variant


@each_variant
def test_it_belongs_to_the_bundled_model(variant):
    eraser = KVEraserEraser(variant=variant)
    assert eraser.variant == eraser.config.variant == variant and eraser.config.base == "reference"
    for dtype in ("float32", "bfloat16"):
        eraser.config.check_base(fingerprint_of(load_model("reference", dtype=dtype).model))


@pytest.mark.slow
def test_leaks_that_masking_leaves_are_gone(tmp_path):
    """A few traces of what the results files measure at length."""
    arms = (Spec("mask"), *(Spec("kveraser", {"variant": variant}) for variant in VARIANTS))
    settings = EraserEval(
        out=tmp_path / "out", tasks=("facts", "injections"), lengths=(256,), n=6, arms=arms, extraction=False
    )
    views = ("task", "length", "span_length", "depth")
    rows = {r["arm"]: r for r in eval_erasers(settings)["rows"] if all(r[view] == "all" for view in views)}
    assert rows["mask"]["leak"] > 0.25
    for arm in arms[1:]:
        found = rows[arm.label]
        assert found["leak"] < 0.1 and found["affected_accuracy"] > rows["recompute"]["affected_accuracy"] - 0.15
        assert found["unaffected_accuracy"] > rows["recompute"]["unaffected_accuracy"] - 0.15
