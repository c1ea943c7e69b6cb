"""The files of adapters, which the library peft reads."""

import json

import numpy as np
import pytest
from safetensors.numpy import load
from support.hf_directories import SMALL

from llada_jax.errors import UserError
from llada_jax.hf.convert import tensors
from llada_jax.hf.peft import CONFIG, WEIGHTS, num_adapter_parameters, peft_files
from llada_jax.hf.read import read_config
from llada_jax.models.adapters import Lora


def test_peft_adds_to_each_matrix_what_the_adapters_add_to_ours():
    rng, lora, arrays = np.random.default_rng(0), Lora(2, 6.0, "blocks/(q|k|ff_out)"), {}

    def read(path, shape):
        arrays[path] = rng.normal(size=shape).astype(np.float32)
        return arrays[path]

    files = peft_files(read, SMALL, lora, layout="llada", base="runs/base")
    config, weights = json.loads(files[CONFIG]), load(files[WEIGHTS])
    assert config["lora_alpha"] / config["r"] == lora.scale
    assert config["base_model_name_or_path"] == "runs/base"
    adapted = [tensor for tensor in tensors("llada", SMALL) if tensor.path in lora.paths]
    assert len(adapted) == 3 * SMALL.num_layers
    assert config["target_modules"] == [t.name.removesuffix(".weight") for t in adapted]
    for tensor, module in zip(adapted, config["target_modules"], strict=True):
        a, b = (arrays[f"{tensor.path}/{part}"][tensor.layer] for part in "ab")
        theirs = [weights.pop(f"base_model.model.{module}.lora_{part}.weight") for part in "BA"]
        np.testing.assert_allclose(
            theirs[0] @ theirs[1], tensor.to_hf((a @ b).reshape(tensor.shape)), rtol=1e-5
        )
    assert not weights
    assert num_adapter_parameters(files) == sum(array.size for array in arrays.values())


def test_adapters_without_their_network_are_refused_as_what_they_are(tmp_path):
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="adapters without the network .* merge_and_unload"):
        read_config(tmp_path)
