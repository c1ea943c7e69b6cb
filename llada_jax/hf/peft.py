"""Adapters as the files that the library `peft` loads onto an exported model."""

import json
from collections.abc import Callable

import numpy as np

from llada_jax.errors import require
from llada_jax.hf.convert import tensors
from llada_jax.models.adapters import Lora, adapter_dims
from llada_jax.models.transformer import Architecture

ADAPTER_FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_files(
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    a: Architecture,
    lora: Lora,
    *,
    layout: str,
    base: str,
) -> dict[str, bytes]:
    """Returns {name: content} of ADAPTER_FILES.

    Args:
        read: (path, shape) -> float32 array, with paths such as "blocks/q/a".
        layout: of the names of the model that they are loaded onto, "llada" or "illada".
        base: where that model is, for the config.
    """
    adapted = [tensor for tensor in tensors(layout, a) if tensor.path in lora.paths]
    pairs = {}
    for path in lora.paths:
        shape = next(tensor.shape for tensor in adapted if tensor.path == path)
        dims = adapter_dims(path, (a.num_layers, *shape), lora)
        pairs[path] = [read(f"{path}/{part}", part_dims) for part, part_dims in zip("ab", dims)]
    weights, modules = {}, []
    for tensor in adapted:
        module = tensor.name.removesuffix(".weight")
        modules.append(module)
        for name, array in zip(("lora_A", "lora_B"), pairs[tensor.path]):
            # A Linear holds the transpose of what is multiplied from the right.
            one_layer = np.ascontiguousarray(array[tensor.layer].T)
            weights[f"base_model.model.{module}.{name}.weight"] = one_layer
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    save = require("safetensors.numpy", extra="hf").save
    return {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: save(weights, metadata={"format": "pt"}),
    }


def num_adapter_parameters(contents: dict[str, bytes]) -> int:
    """Returns how many numbers the files of `peft_files` hold."""
    load = require("safetensors.numpy", extra="hf").load
    return sum(array.size for array in load(contents[WEIGHTS]).values())
