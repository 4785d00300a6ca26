"""The reference model's configuration: from a file, and what is refused."""

import json

import pytest

from kv_retract.errors import KVRetractError
from kv_retract.training.config import ConfigError, ReferenceConfig, longest_at, read_config, steps_of


def test_no_file_means_the_defaults():
    assert read_config(None) == ReferenceConfig()


def test_what_is_in_force_at_a_share_of_the_steps():
    lengths = ((0.0, 100), (0.5, 400), (0.75, 200))
    assert [longest_at(lengths, share) for share in (0.0, 0.49, 0.5, 0.74, 0.75, 0.99)] == [
        100,
        100,
        400,
        400,
        200,
        200,
    ]
    assert steps_of(((0.29, 1e-3), (0.8, 1e-4)), 100) == ((29, 1e-3), (80, 1e-4)), "29 is above 0.29 * 100 in floats"


def test_a_configuration_survives_json(tmp_path):
    config = ReferenceConfig(
        hidden_size=64,
        lengths=((0.0, 96), (0.5, 200)),
        restarts=((0.5, 1e-4), (0.75, 1e-5)),
        families=("facts", "errors"),
        seed=3,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert read_config(path) == config
    path.write_text(json.dumps({"steps": 7}))
    assert read_config(path) == ReferenceConfig(steps=7)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"layers": 3}', "layers"),
        ('{"steps": "many"}', "expected steps to be a number of at least 0, got 'many'"),
        ('{"steps": 1.5}', "steps"),
        ('{"learning_rate": -1}', "learning_rate"),
        ('{"steps": 0}', "at least 1"),
        ('{"lengths": 5}', "not iterable"),
        ('{"lengths": [[0]]}', "expected a JSON object"),
        ('{"lengths": []}', "lengths that begin at 0"),
        ('{"lengths": [[0.5, 100]]}', "lengths that begin at 0"),
        ('{"lengths": [[0, 100], [0.5, 200], [0.4, 300]]}', "ascending shares"),
        ('{"restarts": 5}', "not iterable"),
        ('{"restarts": [[0, 1e-4]]}', "restarts at ascending shares"),
        ('{"restarts": [[0.6, 1e-4], [0.5, 1e-4]]}', "restarts at ascending shares"),
        ('{"restarts": [[0.6, -1]]}', "rates of at least 0"),
        ('{"num_layers": 1}', "at least 2 layers"),
        ('{"head_dim": 33}', "even head_dim"),
        ('{"head_dim": 256}', "even head_dim of 8 to hidden_size"),
        ('{"hidden_size": 32, "head_dim": 16}', "hidden_size of at least 48"),
        ('{"num_heads": 7}', "at least 2 KV heads .* got 2 and 7 heads"),
        ('{"num_heads": 4}', "multiple of at least 3"),
        ('{"num_kv_heads": 0}', "at least 2 KV heads"),
        ('{"families": ["nope"]}', "expected families of errors, facts, .* got nope"),
        ('{"families": ["documents"]}', "got documents"),
        ('{"families": "facts"}', "expected families of"),
        ('{"families": 5}', "not iterable"),
    ],
)
def test_what_is_no_configuration(tmp_path, content, told):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        read_config(path)
    assert isinstance(caught.value, KVRetractError) and "config.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError):
            read_config(path)
