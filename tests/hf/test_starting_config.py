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
@pytest.mark.parametrize("has_tokenizer", [True, False])
@pytest.mark.parametrize("output", ["runs/8b", "gs://b/r", 'a "b" \\\\n {model} it\'s', "a\\nb"])
def test_it_loads_with_the_architecture_and_the_weights(tmp_path, changes, output, has_tokenizer):
    architecture = dataclasses.replace(SMALL, **changes)
    file = tmp_path / "continue.py"
    text = starting_config(
        architecture, source="ORG/NAME", output=output, has_tokenizer=has_tokenizer
    )
    file.write_text(text)
    config = load_config(str(file), ["data.path=/data"])
    assert {name: config.model[name] for name in vars(architecture)} == vars(architecture)
    assert config.checkpoint.init_from == output
    assert workload_of(config).batch_size == 256
    assert "Continues to train ORG/NAME" in text
    # of weights that came without one, no folder can be named
    assert ("--tokenizer TOKENIZER`" in text) == (not has_tokenizer)
    assert ("/tokenizer` has written" in text) == has_tokenizer
