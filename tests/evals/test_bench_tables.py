"""Tables of benchmarks, by hand."""

from kv_retract.evals import bench_tables as tables

MACHINE = {"processor": "Abacus 3", "threads": 2}


def lines(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows, " ".join(line for line in text.splitlines() if not line.startswith("|"))


def test_a_step_by_stages():
    def row(tokens, model, text):
        step = model + text
        return {
            "tokens": tokens, "n": 15, "stages_ms": {"model": model, "text": text},
            "shares": {"model": model / step, "text": text / step}, "not_model_share": text / step,
        }  # fmt: skip

    cost = {"tokens": 4096, "messages": 200, "policies": ["a", "b"], "overhead_ms": 1.5, "bare_ms": 40.0}
    data = {
        "rows": [row(1024, 90.0, 10.0), row(8192, 495.0, 5.0)], "answer": 32, "model": "m", "num_parameters": 3_300_000,
        "dtype": "float32", "machine": MACHINE,
        "overhead": {"all detectors": cost, "no detectors": {**cost, "overhead_ms": 0.5}},
    }  # fmt: skip
    rows, prose = lines(tables.step_table(data))
    assert rows == [
        ["stage, ms", "1024 tokens", "8192 tokens"],
        ["model", "90 (90.0%)", "495 (99.0%)"],
        ["text", "10 (10.0%)", "5 (1.0%)"],
        ["**not the model**", "10.0%", "1.0%"],
    ]
    for told in (
        "decodes 32 tokens",
        "2 detectors",
        "Abacus 3 with 2 threads",
        "adds 1.5 ms",
        "40 ms",
        "0.5 ms without",
    ):
        assert told in prose


def test_the_index_beside_others():
    def row(match, insert):
        return {"match_us": {"median": match}, "insert_us": {"median": insert}}

    data = {
        "cores": {"kv_retract": row(8.0, 7.0), "sglang python": row(80.0, 70.0)}, "floor": row(1.5, 1.0),
        "ratio_to": {"sglang python": {"match": 0.1, "insert": 0.125}, "floor": {"match": 5.5, "insert": 6.0}},
        "workload": {"threads": 10_000, "calls": 79_346, "tokens_asked": 139_000_000, "hit_rate": 0.939},
        "versions": {"sglang": "0.5.23"}, "machine": {**MACHINE, "accelerator": "Fast 9"}, "repeats": 5,
    }  # fmt: skip
    rows, prose = lines(tables.radix_table(data))
    assert [row[:3] for row in rows[1:]] == [
        ["`kv_retract`", "8", "7"], ["`sglang python`", "80", "70"], ["memcmp and memcpy alone", "1.5", "1"],
    ]  # fmt: skip
    assert [row[3:] for row in rows[2:]] == [["0.10", "0.12"], ["5.50", "6.00"]]
    assert "139 M tokens asked for, 94% of them found; SGLang 0.5.23" in prose and "Fast 9" in prose


def test_kernels_by_size():
    row = {"kernel": "gather_pages", "tokens": 8192, "arm": "triton", "ms": 2.0, "of_copy": 0.85, "of_floor": 1.2}
    data = {
        "rows": [row, {**row, "kernel": "kv_map", "tokens": 128, "of_copy": None}], "limits": {"bytes_per_s": 2.5e12},
        "layers": 36, "kv_heads": 8, "head_dim": 128, "page_size": 1, "dtype": "bfloat16", "machine": MACHINE,
        "repeats": 20,
    }  # fmt: skip
    rows, prose = lines(tables.kernels_table(data))
    assert rows[1:] == [
        ["`gather_pages`", "8192", "triton", "2", "85%", "1.2"], ["`kv_map`", "128", "triton", "2", "–", "1.2"],
    ]  # fmt: skip
    assert "36 layers, 8 KV heads of 128, bfloat16" in prose and "a copy moves 2.5 TB/s" in prose


def test_forks_by_weight():
    rows = [
        {"open": "one thread", "kv_bytes": 50e6, "host_bytes": 0.13e6, "ratio": 1.0},
        {"open": "forks", "kv_bytes": 50e6, "host_bytes": 0.63e6, "ratio": 1.0099},
    ]
    data = {"rows": rows, "forks": 1000, "context": 8192, "own_tokens": 16, "own_kv_bytes": 98e6}
    rows, prose = lines(tables.memory_table(data))
    assert rows[1:] == [["one thread", "50", "0.13", "1.000"], ["forks", "50", "0.63", "1.010"]]
    assert "1000 forks of a thread of 8192 tokens" in prose and "98 MB" in prose
