"""LLaDA in PyTorch, under the tensor names of the published checkpoints. The loss is in
masked_diffusion.py and the sampler in diffusion_sampler.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_llada import LLaDAConfig

# for transformers 4, which fetches what this file imports, and not what those files import
from .diffusion_rules import REMASKING  # noqa: F401
from .diffusion_sampler import DiffusionSampler
from .masked_diffusion import MaskedDiffusionLM, RMSNorm, attend, residual_linear


class LLaDABlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: LLaDAConfig, layer_number: int):
        super().__init__()
        width, hidden, kv_width = (
            config.d_model,
            config.mlp_hidden_size,
            config.n_kv_heads * config.head_dim,
        )
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.q_norm = (
            RMSNorm(width, config.rms_norm_eps) if config.attention_layer_norm else nn.Identity()
        )
        self.k_norm = (
            RMSNorm(kv_width, config.rms_norm_eps) if config.attention_layer_norm else nn.Identity()
        )
        self.attn_out = residual_linear(width, width, layer_number)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)  # the gate
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = residual_linear(hidden, width, layer_number)

    def forward(self, x_BTD: Tensor, rotary, is_seen, cache=None) -> Tensor:
        y_BTD = self.attn_norm(x_BTD)
        q, k, v = (
            self.q_norm(self.q_proj(y_BTD)),
            self.k_norm(self.k_proj(y_BTD)),
            self.v_proj(y_BTD),
        )
        x_BTD = x_BTD + self.attn_out(
            attend(q, k, v, head_dim=self.head_dim, rotary=rotary, is_seen=is_seen, cache=cache)
        )
        y_BTD = self.ff_norm(x_BTD)
        return x_BTD + self.ff_out(F.silu(self.ff_proj(y_BTD)) * self.up_proj(y_BTD))


class LLaDAModel(nn.Module):
    """Holds the modules under their published names; MaskedDiffusionLM runs them."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(
                LLaDABlock(config, number) for number in range(config.n_layers)
            ),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)


class LLaDAModelLM(DiffusionSampler, MaskedDiffusionLM):
    """LLaDA: see MaskedDiffusionLM.forward for the loss and DiffusionSampler.generate_diffusion
    for sampling.
    """

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]
    required = {
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": (False, None),
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "include_bias": False,
        "include_qkv_bias": (False, None),
        "init_cutoff_factor": (None, 3.0),
        "init_fn": "mitchell",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "rope_parameters": None,
        "rope_scaling": None,
        "scale_logits": False,
    }

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def transformer_parts(self):
        parts = self.model.transformer
        return (
            parts["wte"],
            parts["blocks"],
            parts["ln_f"],
            parts["wte" if self.config.weight_tying else "ff_out"],
        )

    def set_input_embeddings(self, module: nn.Embedding) -> None:
        self.model.transformer["wte"] = module

    def set_output_embeddings(self, module: nn.Module) -> None:
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = module

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        wte = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = wte.num_embeddings
        return wte
