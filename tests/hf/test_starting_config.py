"""The config that an import writes loads, and describes the network that was imported."""

import dataclasses

import pytest
from support.hf_directories import SMALL

from llada_jax.config import load_config
from llada_jax.hf.starting_config import starting_config
from llada_jax.verbs.plan import workload_of


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": (8.0, 1.0, 4.0, 40.0), "attention_bias": "qkv", "output_shift": True},
    ],
)
@pytest.mark.parametrize("output", ["runs/8b", "gs://b/r", 'a "b" \\\\n {model} it\'s', "a\\nb"])
def test_it_loads_with_the_architecture_and_the_weights(tmp_path, changes, output):
    architecture = dataclasses.replace(SMALL, **changes)
    file = tmp_path / "continue.py"
    file.write_text(starting_config(architecture, source="ORG/NAME", output=output))
    config = load_config(str(file), ["data.path=/data"])
    assert {name: config.model[name] for name in vars(architecture)} == vars(architecture)
    assert config.checkpoint.init_from == output
    assert workload_of(config).batch_size == 256
    assert "Continues to train ORG/NAME" in file.read_text()
