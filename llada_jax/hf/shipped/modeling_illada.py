"""iLLaDA in PyTorch, under Llama's tensor names. The loss is in masked_diffusion.py and the sampler
in diffusion_sampler.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_illada import ILLaDAConfig

# for transformers 4, which fetches what this file imports, and not what those files import
from .diffusion_rules import REMASKING  # noqa: F401
from .diffusion_sampler import DiffusionSampler
from .masked_diffusion import MaskedDiffusionLM, RMSNorm, attend, residual_linear


class ILLaDAAttention(nn.Module):
    """Grouped-query attention in both directions, with optional biases and QK-norm."""

    def __init__(self, config: ILLaDAConfig, layer_number: int):
        super().__init__()
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias in (True, "qkv", "qkvo")
        out_bias = config.attention_bias in (True, "qkvo")
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = residual_linear(q_width, width, layer_number, bias=out_bias)
        if config.qk_norm != "none":
            is_full = config.qk_norm == "full"
            self.q_norm = RMSNorm(q_width if is_full else config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(kv_width if is_full else config.head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rotary, is_seen, cache=None) -> Tensor:
        q_BTD, k_BSD, v_BSD = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.qk_norm == "full":
            q_BTD, k_BSD = self.q_norm(q_BTD), self.k_norm(k_BSD)
        if self.qk_norm == "per_head":
            q_BTD = self.q_norm(q_BTD.unflatten(-1, (-1, self.head_dim))).flatten(2)
            k_BSD = self.k_norm(k_BSD.unflatten(-1, (-1, self.head_dim))).flatten(2)
        known = {"rotary": rotary, "is_seen": is_seen, "cache": cache}
        return self.o_proj(attend(q_BTD, k_BSD, v_BSD, head_dim=self.head_dim, **known))


class ILLaDAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ILLaDAConfig, layer_number: int):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = residual_linear(hidden, width, layer_number)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class ILLaDALayer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: ILLaDAConfig, layer_number: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ILLaDAAttention(config, layer_number)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ILLaDAMLP(config, layer_number)

    def forward(self, x_BTD: Tensor, rotary, is_seen, cache=None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, is_seen, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class ILLaDAModel(nn.Module):
    """Holds the modules under Llama's names; MaskedDiffusionLM runs them."""

    def __init__(self, config: ILLaDAConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ILLaDALayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class ILLaDAModelLM(DiffusionSampler, MaskedDiffusionLM):
    """iLLaDA: see MaskedDiffusionLM.forward for the loss and DiffusionSampler.generate_diffusion
    for sampling.
    """

    config_class = ILLaDAConfig
    _no_split_modules = ["ILLaDALayer"]
    required = {
        "attention_bias": (False, "none", True, "qkv", "qkvo"),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "qk_norm": ("none", "per_head", "full"),
    }

    def __init__(self, config: ILLaDAConfig):
        super().__init__(config)
        self.model = ILLaDAModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def transformer_parts(self):
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.model.embed_tokens, self.model.layers, self.model.norm, head

    def set_input_embeddings(self, module: nn.Embedding) -> None:
        self.model.embed_tokens = module

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embed_tokens = super().resize_token_embeddings(*args, **kwargs)
        if args or kwargs:
            # The caller has said how many ids there are.
            self.config.unpadded_vocab_size = None
        return embed_tokens

    def set_output_embeddings(self, module: nn.Module) -> None:
        if self.config.tie_word_embeddings:
            self.model.embed_tokens = module
        else:
            self.lm_head = module

    def _logits(
        self, x_BTD: Tensor, is_real_BT: Tensor | None, columns: slice | None = None
    ) -> Tensor:
        if self.config.output_shift:
            before_BTD = torch.cat([x_BTD[:, :1], x_BTD[:, :-1]], dim=1)
            # the first real token keeps its own hidden state, wherever the row begins
            if is_real_BT is not None:
                is_before_real_BT = torch.cat([is_real_BT[:, :1], is_real_BT[:, :-1]], dim=1)
                before_BTD = torch.where(is_before_real_BT[..., None], before_BTD, x_BTD)
            x_BTD = before_BTD
        return super()._logits(x_BTD, is_real_BT, columns)
