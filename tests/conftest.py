"""Eight CPU devices for every test, so that meshes can be compared inside one process."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def published() -> Path:
    """A tiny LLaDA checkpoint in the published layout, with what the published PyTorch code computes from it."""
    return Path(__file__).parent / "fixtures" / "llada_official_tiny"
