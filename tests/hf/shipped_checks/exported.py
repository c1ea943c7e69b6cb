"""The PyTorch files of an export in small models: what the checks in this folder share.

Pytest loads it as a plugin, so that its fixtures are known in each of them.
"""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

HERE = Path(__file__).parent
PUBLISHED = HERE.parents[1] / "fixtures" / "llada_official_tiny"
SHIPPED = HERE.parents[2] / "llada_jax" / "hf" / "shipped"
FILES = {
    layout: (
        f"configuration_{layout}.py",
        f"modeling_{layout}.py",
        "masked_diffusion.py",
        "diffusion_sampler.py",
        "diffusion_rules.py",
    )
    for layout in ("llada", "illada")
}
FACTS = json.loads((PUBLISHED / "expected.json").read_text())
MASK, EOS = FACTS["mask_token_id"], FACTS["eos_token_id"]
SMALL = {
    "llada": {
        "model_type": "llada",
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": 40,
        "embedding_size": 40,
        "mask_token_id": 39,
        "eos_token_id": 38,
        "pad_token_id": 38,
    },
    "illada": {
        "model_type": "illada",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 40,
        "mask_token_id": 39,
        "eos_token_id": 38,
        "pad_token_id": 38,
    },
}
# with theta = 100 and heads of 8, wavelengths of 6 (kept), 20 (mixed), 63 and 199 tokens
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 10,
}
VARIANTS = {
    "llada": {},
    "llada, tied, QK-norm": {"weight_tying": True, "attention_layer_norm": True},
    "illada": {"tie_word_embeddings": False},
    "illada, tied, QK-norm per head": {"tie_word_embeddings": True, "qk_norm": "per_head"},
    "illada, scaled frequencies": {
        "rope_theta": 100.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": False,
    },
    "illada, full QK-norm, biases, shift": {
        "qk_norm": "full",
        "attention_bias": "qkvo",
        "output_shift": True,
    },
}
seeded = torch.Generator().manual_seed


def expected(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(PUBLISHED / "expected.npz")[name])


def export_directory(directory: Path, layout: str, config: dict) -> Path:
    """A directory as `llada-jax export` leaves it, but for the weights."""
    directory.mkdir()
    for file in FILES[layout]:
        shutil.copyfile(SHIPPED / file, directory / file)
    module, stem = f"modeling_{layout}", {"llada": "LLaDA", "illada": "ILLaDA"}[layout]
    (directory / "custom_generate").mkdir()
    shutil.copyfile(SHIPPED / "generate.py", directory / "custom_generate" / "generate.py")
    auto_map = {"AutoConfig": f"configuration_{layout}.{stem}Config"}
    auto_map |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"{module}.{stem}ModelLM")
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The published fixture with our files next to it."""
    config = json.loads((PUBLISHED / "config.json").read_text())
    directory = export_directory(tmp_path_factory.mktemp("exports") / "published", "llada", config)
    shutil.copyfile(PUBLISHED / "model.safetensors", directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def model(directory):
    return AutoModel.from_pretrained(directory, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a small model from a config with changes, freshly initialised."""
    root = tmp_path_factory.mktemp("small")
    numbers = itertools.count()

    def make(variant: str, **changes):
        layout = variant.split(",")[0]
        config = SMALL[layout] | VARIANTS[variant] | changes
        config = AutoConfig.from_pretrained(
            export_directory(root / f"model{next(numbers)}", layout, config), trust_remote_code=True
        )
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        with torch.no_grad():  # ones and zeros would hide a norm or a bias that is not applied
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape)
        return made.eval()

    return make


def shared(model, name: str = "MaskedDiffusionLM"):
    """The module that came with the model and holds a class of this name."""
    return sys.modules[next(c.__module__ for c in type(model).__mro__ if c.__name__ == name)]
