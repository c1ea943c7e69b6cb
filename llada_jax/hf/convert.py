"""ONE table between our parameters and the tensors of Hugging Face checkpoints, walked in both
directions.

Two ways of naming the same network exist: that of the published LLaDA-8B (layout "llada"), and that
of Llama, which iLLaDA ("illada"), Llama, Qwen2 and Qwen3 share. Which of them a checkpoint has, its
config.json says (config_json.py).
"""

import dataclasses
import math

from llada_jax.models.transformer import Architecture

# Our path, its dims, the dims of the published tensor (those that stand together are one dim of
# it), and its two names. V vocabulary, D width, N query heads, K key/value heads, H head width, F
# feed-forward width; the layer is left out.
TABLE = (
    ("embed", "VD", "V D", "wte.weight", "embed_tokens.weight"),
    ("blocks/attn_norm", "D", "D", "attn_norm.weight", "input_layernorm.weight"),
    ("blocks/q", "DNH", "NH D", "q_proj.weight", "self_attn.q_proj.weight"),
    ("blocks/q_bias", "NH", "NH", None, "self_attn.q_proj.bias"),
    ("blocks/k", "DKH", "KH D", "k_proj.weight", "self_attn.k_proj.weight"),
    ("blocks/k_bias", "KH", "KH", None, "self_attn.k_proj.bias"),
    ("blocks/v", "DKH", "KH D", "v_proj.weight", "self_attn.v_proj.weight"),
    ("blocks/v_bias", "KH", "KH", None, "self_attn.v_proj.bias"),
    ("blocks/q_norm", "NH", "NH", "q_norm.weight", "self_attn.q_norm.weight"),
    ("blocks/k_norm", "KH", "KH", "k_norm.weight", "self_attn.k_norm.weight"),
    ("blocks/attn_out", "NHD", "D NH", "attn_out.weight", "self_attn.o_proj.weight"),
    ("blocks/attn_out_bias", "D", "D", None, "self_attn.o_proj.bias"),
    ("blocks/ff_norm", "D", "D", "ff_norm.weight", "post_attention_layernorm.weight"),
    ("blocks/ff_gate", "DF", "F D", "ff_proj.weight", "mlp.gate_proj.weight"),
    ("blocks/ff_up", "DF", "F D", "up_proj.weight", "mlp.up_proj.weight"),
    ("blocks/ff_out", "FD", "D F", "ff_out.weight", "mlp.down_proj.weight"),
    ("final_norm", "D", "D", "ln_f.weight", "norm.weight"),
    ("lm_head", "DV", "V D", "ff_out.weight", "lm_head.weight"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    path: ours, such as "blocks/q". layer: its row of our stacked array, None outside of the blocks.
    name: in the file. dims: ours, one letter each. hf_dims: those of the file, such as "NH D".
    sizes: {letter: size}.
    """

    path: str
    layer: int | None
    name: str
    dims: str
    hf_dims: str
    sizes: dict[str, int] = dataclasses.field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of our array, without the dim of the layers."""
        return tuple(self.sizes[letter] for letter in self.dims)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return tuple(
            math.prod(self.sizes[letter] for letter in group) for group in self.hf_dims.split()
        )

    def of(self, params: dict):
        """Returns our array (one layer of it) in a nested dict of parameters."""
        if self.layer is None:
            return params[self.path]
        return params["blocks"][self.path.removeprefix("blocks/")][self.layer]

    def to_hf(self, array):
        """Returns the file's tensor of our array (one layer of it), of any dtype."""
        return array.transpose([self.dims.index(letter) for letter in self._hf_letters]).reshape(
            self.hf_shape
        )

    def from_hf(self, array):
        """Returns our array (one layer of it) of the file's tensor, of any dtype."""
        letters = self._hf_letters
        split = array.reshape([self.sizes[letter] for letter in letters])
        return split.transpose([letters.index(letter) for letter in self.dims])

    @property
    def _hf_letters(self) -> str:
        return self.hf_dims.replace(" ", "")


def tensors(layout: str, a: Architecture) -> list[Tensor]:
    """Returns every tensor of a checkpoint in the order of the network: embedding, layer by layer,
    head.
    """
    sizes = {
        "V": a.vocab_size,
        "D": a.d_model,
        "N": a.num_heads,
        "K": a.num_kv_heads,
        "H": a.head_dim,
        "F": a.d_ff,
    }
    absent = {
        "lm_head": a.tie_embeddings,
        "blocks/q_norm": a.qk_norm == "none",
        "blocks/k_norm": a.qk_norm == "none",
        "blocks/q_bias": a.attention_bias == "none",
        "blocks/k_bias": a.attention_bias == "none",
        "blocks/v_bias": a.attention_bias == "none",
        "blocks/attn_out_bias": a.attention_bias != "qkvo",
    }
    found: dict[int | None, list[Tensor]] = {
        None: [],
        **{layer: [] for layer in range(a.num_layers)},
    }
    for path, dims, hf_dims, llada_name, llama_name in TABLE:
        if absent.get(path):
            continue
        if a.qk_norm == "per_head" and path in ("blocks/q_norm", "blocks/k_norm"):
            dims = hf_dims = "H"
        for layer in range(a.num_layers) if path.startswith("blocks/") else (None,):
            name = _full_name(layout, path, layer, llada_name if layout == "llada" else llama_name)  # type: ignore[arg-type]
            found[layer].append(Tensor(path, layer, name, dims, hf_dims, sizes))
    embed, *rest = found.pop(None)
    return [embed, *(tensor for layer in found.values() for tensor in layer), *rest]


def _full_name(layout: str, path: str, layer: int | None, name: str) -> str:
    if layout == "llada":
        return (
            f"model.transformer.blocks.{layer}.{name}"
            if layer is not None
            else f"model.transformer.{name}"
        )
    if path == "lm_head":
        return name
    return f"model.layers.{layer}.{name}" if layer is not None else f"model.{name}"
