"""The config of LLaDA in the published layout, for transformers."""

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
}

# Every key of the published config.json, with the values of LLaDA-8B.
LLADA_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    # RMSNorm of the whole query and key vectors, before the split into heads
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,  # rows of the embedding and of the head; vocab_size if null
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,  # not used by "mitchell"
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,  # mlp_ratio * d_model if null
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,  # n_heads if null
    "n_layers": 32,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


class LLaDAConfig(PretrainedConfig):
    """The keys of the published config.json; one that is not given has the value of LLaDA-8B.

    The standard names of transformers (hidden_size, num_attention_heads, ...) are aliases.
    `weight_tying` alone decides whether embedding and head share one matrix.
    """

    model_type = "llada"
    _auto_class = "AutoConfig"  # save_pretrained copies the code next to the weights
    attribute_map = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(self, bos_token_id=None, eos_token_id=126081, pad_token_id=126081, **kwargs):
        # transformers' own default of tie_word_embeddings is True, whatever the published config
        # says
        kwargs.pop("tie_word_embeddings", None)
        keys = {key: kwargs.pop(key, value) for key, value in LLADA_8B.items()}
        if keys["n_kv_heads"] is None:
            keys["n_kv_heads"] = 1 if keys["multi_query_attention"] else keys["n_heads"]
        if keys["mlp_hidden_size"] is None:
            keys["mlp_hidden_size"] = keys["mlp_ratio"] * keys["d_model"]
        if keys["embedding_size"] is None:
            keys["embedding_size"] = keys["vocab_size"]
        for key, value in keys.items():
            setattr(self, key, value)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=keys["weight_tying"],
            auto_map=kwargs.pop("auto_map", AUTO_MAP),
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads
