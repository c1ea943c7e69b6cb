"""Hugging Face directories with random weights, written with numpy and the table of
llada_jax.hf.convert alone.
"""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llada_jax.hf.config_json import LLAMA3, hf_config
from llada_jax.hf.convert import tensors
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

SMALL = Architecture(
    vocab_size=320,
    num_layers=2,
    d_model=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    d_ff=96,
    rope_theta=1e4,
    norm_eps=1e-6,
)


def write_tokenizer(
    directory: Path, *special: str, end_id: int = 256, chat_template: str = ""
) -> None:
    """Writes tokenizer.json and tokenizer_config.json: 256 byte tokens, tokens of no text up to
    `end_id`, then the special ones, <|endoftext|> first.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"unused {i}" for i in range(len(letters), end_id)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate([*letters, *unused])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", *special)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        **({"chat_template": chat_template} if chat_template else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def random_params(a: Architecture, *, seed: int = 0) -> dict:
    """Returns parameters away from their initialisation (norms are not 1, biases not 0), float32,
    at a size like trained weights have.
    """
    rng = np.random.default_rng(seed)
    draw = {
        "norm": lambda shape: 1 + 0.1 * rng.normal(size=shape),
        "bias": lambda shape: 0.1 * rng.normal(size=shape),
    }

    def one(path, leaf):
        kind = path[-1].key.rpartition("_")[2]
        values = draw[kind](leaf.shape) if kind in draw else 0.08 * rng.normal(size=leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, make_model(a).abstract)


def causal_config(layout: str, a: Architecture, **changes) -> dict:
    """Returns the config.json that transformers writes for a LlamaForCausalLM, Qwen2ForCausalLM or
    Qwen3ForCausalLM.
    """
    config = {
        "model_type": layout,
        "hidden_act": "silu",
        "hidden_size": a.d_model,
        "intermediate_size": a.d_ff,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "vocab_size": a.vocab_size,
        "eos_token_id": 256,
        "rope_parameters": {
            "rope_theta": a.rope_theta,
            "rope_type": "llama3" if a.rope_scaling else "default",
            **dict(zip(LLAMA3, a.rope_scaling)),
        },
        "architectures": [
            {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[layout] + "ForCausalLM"
        ],
    }
    if layout != "qwen2":
        config["attention_bias"] = a.attention_bias == "qkvo"
    return {**config, **changes}


def our_config(layout: str, a: Architecture, **changes) -> dict:
    """Returns the config.json of an export with the special ids of `write_tokenizer(directory,
    "<|mdm_mask|>")`.
    """
    # of the bytes tokenizer, where the embedding has its rows
    end, mask = min(256, a.vocab_size - 2), min(257, a.vocab_size - 1)
    ids = {"eos_id": end, "bos_id": end, "pad_id": end, "mask_id": mask}
    return {**hf_config(a, layout, **ids, max_sequence_length=128, dtype="float32"), **changes}


def write_weights(
    directory: Path,
    layout: str,
    a: Architecture,
    params: dict,
    *,
    num_shards: int = 1,
    dtype=np.float32,
):
    """Writes model.safetensors, or shards with their index."""
    files = {
        tensor.name: np.ascontiguousarray(tensor.to_hf(tensor.of(params)).astype(dtype))
        for tensor in tensors(layout, a)
    }
    if num_shards == 1:
        save_file(files, directory / "model.safetensors")
        return
    names, index = list(files), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard::num_shards]
        save_file({name: files[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def write_huggingface(
    directory: Path, layout: str, a: Architecture, *, seed: int = 0, **kwargs
) -> dict:
    """Writes a whole directory, tokenizer included, and returns the parameters in it; kwargs go to
    write_weights.
    """
    directory.mkdir(parents=True)
    is_causal = layout in ("llama", "qwen2", "qwen3")
    params = random_params(a, seed=seed)
    config = causal_config(layout, a) if is_causal else our_config(layout, a)
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory, layout, a, params, **kwargs)
    write_tokenizer(
        directory,
        *([] if is_causal else ["<|mdm_mask|>", "<|eot_id|>"]),
        chat_template="{{ messages }}",
    )
    return params
