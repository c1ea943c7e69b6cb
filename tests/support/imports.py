"""Small Llama and Qwen networks to import, and configs that continue from them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.models.model import abstract_parameters, make_model
from support.hf_directories import SMALL

QWEN = dataclasses.replace(SMALL, vocab_size=257, attention_bias="qkv", tie_embeddings=True)
LLAMA3 = dataclasses.replace(
    SMALL, rope_theta=100.0, rope_scaling=(8.0, 1.0, 4.0, 40.0), tie_embeddings=True
)


def abstract_on(a, num_devices: int = 1, **axes) -> dict:
    """Returns the shapes and shardings of the parameters on a mesh with these axes."""
    sizes = {**dict.fromkeys(AXES, 1), **axes}
    return abstract_parameters(make_model(a), make_mesh(sizes, devices=jax.devices()[:num_devices]))


def assert_equal_params(ours: dict, theirs: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), theirs)


def small_config(directory: Path, data: Path, init_from: Path, *changes: str) -> str:
    """Writes a config that trains four steps from the weights in `init_from`; returns its path."""
    lines = [
        "num_steps = 4",
        "data.batch_size = 8",
        "data.sequence_length = 16",
        f"data.path = {str(data)!r}",
        "schedule.name = 'constant'",
        "schedule.learning_rate = 1e-3",
        "schedule.warmup_steps = 0",
        "log.every_steps = 1",
        "log.tensorboard = False",
        "evaluation.every_steps = 0",
        "checkpoint.every_steps = 4",
        f"checkpoint.init_from = {str(init_from)!r}",
        *changes,
    ]
    body = "\n".join(f"    config.{line.removeprefix('config.')}" for line in lines)
    head = "from llada_jax.config import default_config\n\n\n"
    head += "def get_config():\n    config = default_config()\n"
    file = directory / f"{init_from.name}.py"
    file.write_text(f"{head}{body}\n    return config\n")
    return str(file)
