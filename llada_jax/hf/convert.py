"""ONE table between our parameter paths and the tensor names of the published LLaDA-8B layout (`LLaDAModelLM`).

A published linear weight is [out, in]; ours is [in, out] with the heads as dims of their own.
"""

import json
from pathlib import Path

import numpy as np

from llada_jax.errors import UserError, require
from llada_jax.models.transformer import Architecture

# our name -> (published name inside a block, how the published tensor becomes ours)
BLOCK = {
    "attn_norm": ("attn_norm", lambda w, a: w),
    "q": ("q_proj", lambda w, a: w.T.reshape(a.d_model, a.num_heads, a.head_dim)),
    "k": ("k_proj", lambda w, a: w.T.reshape(a.d_model, a.num_kv_heads, a.head_dim)),
    "v": ("v_proj", lambda w, a: w.T.reshape(a.d_model, a.num_kv_heads, a.head_dim)),
    "attn_out": ("attn_out", lambda w, a: w.T.reshape(a.num_heads, a.head_dim, a.d_model)),
    "ff_norm": ("ff_norm", lambda w, a: w),
    "ff_gate": ("ff_proj", lambda w, a: w.T),
    "ff_up": ("up_proj", lambda w, a: w.T),
    "ff_out": ("ff_out", lambda w, a: w.T),
}
TOP = {
    "embed": ("wte", lambda w: w),
    "final_norm": ("ln_f", lambda w: w),
    "lm_head": ("ff_out", lambda w: w.T),
}
PREFIX = "model.transformer"


def published_name(path: str, layer: int | None = None) -> str:
    """Returns the published tensor name of one of our paths, such as ("blocks/q", 3) or ("embed",)."""
    if path.startswith("blocks/"):
        return f"{PREFIX}.blocks.{layer}.{BLOCK[path.removeprefix('blocks/')][0]}.weight"
    return f"{PREFIX}.{TOP[path][0]}.weight"


def read_published(directory) -> tuple[Architecture, dict]:
    """Reads a dense checkpoint of the published layout into memory.

    Returns:
        its Architecture and its parameters as a nested dict of float32 arrays, the layers stacked.

    Raises:
        UserError: a tensor is missing or a key of config.json asks for what the network does not have.
    """
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    wanted = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False}
    for key, value in wanted.items():
        if config.get(key) != value:
            raise UserError(f"{directory}/config.json: {key}={config.get(key)!r}; only {value!r} is LLaDA's network.")
    a = Architecture(
        vocab_size=config["embedding_size"], num_layers=config["n_layers"], d_model=config["d_model"],
        num_heads=config["n_heads"], num_kv_heads=config["n_kv_heads"], head_dim=config["d_model"] // config["n_heads"],
        d_ff=config["mlp_hidden_size"], rope_theta=config["rope_theta"], norm_eps=config["rms_norm_eps"],
        tie_embeddings=config["weight_tying"], qk_norm="full" if config["attention_layer_norm"] else "none",
    )  # fmt: skip
    safetensors = require("safetensors.numpy", extra="hf")
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= safetensors.load_file(file)

    def take(path, layer=None):
        name = published_name(path, layer)
        if name not in tensors:
            raise UserError(f"{directory} lacks the tensor {name}; copy all of its *.safetensors files.")
        return np.asarray(tensors[name], np.float32)

    blocks = {
        ours: np.stack([transform(take(f"blocks/{ours}", layer), a) for layer in range(a.num_layers)])
        for ours, (_, transform) in BLOCK.items()
    }
    top = {
        ours: transform(take(ours)) for ours, (_, transform) in TOP.items() if ours != "lm_head" or not a.tie_embeddings
    }
    return a, {"blocks": blocks, **top}
