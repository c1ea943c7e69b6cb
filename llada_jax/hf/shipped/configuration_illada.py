"""The config of iLLaDA, a masked diffusion language model under Llama's names, for transformers."""

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_illada.ILLaDAConfig",
    "AutoModel": "modeling_illada.ILLaDAModelLM",
    "AutoModelForCausalLM": "modeling_illada.ILLaDAModelLM",
}


class ILLaDAConfig(PretrainedConfig):
    """Llama's keys and three of our own; the sizes default to those of iLLaDA-8B (arXiv
    2606.25331).

    Args:
        head_dim: hidden_size / num_attention_heads if None.
        attention_bias: False or "none"; "qkv" as Qwen2; True or "qkvo" as Llama's attention_bias.
        rope_scaling: None, or Llama 3.1's {"rope_type": "llama3", "factor", "low_freq_factor",
            "high_freq_factor", "original_max_position_embeddings"}. It is kept and saved as
            rope_parameters, as transformers 5 calls it.
        qk_norm: RMSNorm of queries and keys: "none", "per_head" as Qwen3, or "full", before the
            split into heads.
        output_shift: the logits of position i come from the hidden state of i - 1, as in the
            autoregressive models from which such a checkpoint was adapted; position 0 keeps its
            own.
    """

    model_type = "illada"
    _auto_class = "AutoConfig"  # save_pretrained copies the code next to the weights

    def __init__(
        self,
        vocab_size=155136,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        rope_parameters=None,
        tie_word_embeddings=True,
        attention_bias=False,
        qk_norm="none",
        output_shift=False,
        mask_token_id=5,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.output_shift = output_shift
        self.mask_token_id = mask_token_id
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            auto_map=kwargs.pop("auto_map", AUTO_MAP),
            **kwargs,
        )
        if rope_scaling or rope_parameters:  # transformers 5 needs rope_theta in it, too
            self.rope_parameters = {**(rope_scaling or rope_parameters), "rope_theta": rope_theta}
