"""Plausible faults of networks."""

from mutations.fault import faults_of

TRANSFORMER = faults_of(
    "llada_jax/models/transformer.py",
    "tests/models/test_transformer.py::test_logits_equal_a_float64_reference",
    (
        "rotary positions in bfloat16",
        "positions_BT[..., None].astype(jnp.float32) *",
        "positions_BT[..., None].astype(jnp.bfloat16).astype(jnp.float32) *",
        "tests/models/test_precision.py tests/models/test_rotary.py",
    ),
    (
        "cos and sin in bfloat16",
        "return constrain(jnp.cos(angle), *names), constrain(jnp.sin(angle), *names)",
        "return tuple(f(angle.astype(jnp.bfloat16)) for f in (jnp.cos, jnp.sin))",
        "tests/models/test_precision.py",
    ),
    (
        "vectors rotated in bfloat16",
        "cos, sin = cos[:, :, None], sin[:, :, None]",
        "cos, sin = (f[:, :, None].astype(x_BTNH.dtype) for f in (cos, sin))",
        "tests/models/test_precision.py",
    ),
    (
        "norms in bfloat16",
        "x32 = x.astype(jnp.float32)\n    normed",
        "x32 = x\n    normed",
        "tests/models/test_precision.py",
    ),
    (
        "scale of a norm in bfloat16",
        "return (normed * scale).astype(x.dtype)",
        "return normed.astype(x.dtype) * scale.astype(x.dtype)",
        "tests/models/test_precision.py tests/models/test_gradients.py",
    ),
    (
        "logits of the head in bfloat16",
        "return project(x_BTD, self.head_kernel(), out_dtype=jnp.float32)",
        "return project(x_BTD, self.head_kernel()).astype(jnp.float32)",
        "tests/models/test_precision.py",
    ),
    (
        "embedding cast before the gather",
        "x_BTD = table_VD[tokens_BT].astype(dtype)",
        "x_BTD = table_VD.astype(dtype)[tokens_BT]",
        "tests/models/test_precision.py",
    ),
    (
        "bias added in bfloat16",
        "return (x.astype(jnp.float32) + bias).astype(x.dtype)",
        "return x + bias.astype(x.dtype)",
        "tests/models/test_precision.py",
    ),
    (
        "wrong half rotated",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
    ),
    (
        "no rotation of keys",
        "constrain(rotate(k_BSKH, cos, sin), *names)",
        "constrain(k_BSKH, *names)",
    ),
    (
        "feed-forward norm taken from attention",
        "y_BTD = normed_stream(x_BTD, self.ff_norm[...], a.norm_eps)",
        "y_BTD = normed_stream(x_BTD, self.attn_norm[...], a.norm_eps)",
    ),
    (
        "gate and up exchanged",
        "jax.nn.silu(gate_BTF) * up_BTF,",
        "gate_BTF * jax.nn.silu(up_BTF),",
    ),
    (
        "no residual around the feed-forward part",
        'x_BTD = x_BTD + self.times("ff_out", h_BTF, ',
        'x_BTD = self.times("ff_out", h_BTF, ',
    ),
    (
        "shift across segments",
        "(before_BT == segment_ids_BT)[..., None], before_BTD, x_BTD)",
        "(before_BT == segment_ids_BT)[..., None], before_BTD, before_BTD)",
    ),
    (
        "initialisation not scaled by depth",
        "residual = (2.0 * (layer + 1)) ** -0.5",
        "residual = (2.0 * (0 * layer + 1)) ** -0.5",
        "tests/models/test_initialisation.py",
    ),
    (
        "recomputation never switched on",
        'if self.remat == "none":',
        'if self.remat != "always":',
        "tests/models/test_transformer.py::test_recomputation_changes_memory_but_not_the_gradient",
    ),
    (
        "norms counted once per model",
        "norms = a.d_model * (2 * a.num_layers + 1)",
        "norms = a.d_model * (2 * a.num_layers)",
        "tests/models/test_initialisation.py",
    ),
    (
        "activation rule lost after attention",
        'constrain(x_BTD, "act_batch", "act_position", "act_embed")\n\n    def add_feed',
        "x_BTD\n\n    def add_feed",
        "tests/training/test_resources.py tests/models/test_activations.py",
    ),
    (
        "activation rule lost in the feed-forward part",
        'names = ("act_batch", "act_position", "act_mlp")',
        'names = ("act_batch", "act_position", None)',
        "tests/training/test_resources.py tests/models/test_activations.py",
    ),
)

TOKEN_SCORES = faults_of(
    "llada_jax/models/token_scores.py",
    "tests/models/test_token_nll.py tests/models/test_token_scores.py",
    (
        "logits of the loss in bfloat16",
        "            out_dtype=jnp.float32,\n            gradient_dtype",
        "            gradient_dtype",
        "tests/models/test_precision.py",
    ),
    (
        "tokens that do not exist enter the normaliser",
        "jnp.where(token_C < V, 0.0, jnp.finfo(jnp.float32).min)",
        "jnp.where(token_C <= V + 999, 0.0, jnp.finfo(jnp.float32).min)",
    ),
    (
        "nll outside of the masks",
        "TokenScores(jnp.where(where_BT, scores.nll_BT, 0.0), ",
        "TokenScores(scores.nll_BT, ",
    ),
    (
        "accuracy counts what was not masked",
        "scores.is_correct_BT & where_BT)",
        "scores.is_correct_BT)",
    ),
    (
        "one masked position too many is dropped",
        "axis=1) > room)",
        "axis=1) > room + 1)",
    ),
    (
        "one device with too many masks is not enough",
        "jnp.any(jnp.sum(where_GP",
        "jnp.all(jnp.sum(where_GP",
    ),
    (
        "the logits of an evaluation grow with the batch",
        "T * MOST_LOGITS // (num_local * kernel_DV.shape[1])",
        "T * MOST_LOGITS // (T * kernel_DV.shape[1])",
    ),
    (
        "the gradient of a position that was not picked is that of another",
        "*[1] * (taken.ndim - 2)), taken, 0)",
        "*[1] * (taken.ndim - 2)), taken, taken)",
    ),
)

MODEL = faults_of(
    "llada_jax/models/model.py",
    "tests/models/test_transformer.py::test_logits_of_a_window_equal_those_columns_of_all_logits",
    (
        "window cut before the shift",
        "start, length, axis=1)\n        return self.head_fn",
        "start + 1, length, axis=1)\n        return self.head_fn",
    ),
    (
        "bfloat16 on the CPU by default",
        'if name == "auto":',
        'if name == "automatic":',
        "tests/config/test_choices.py",
    ),
)

MASKS = faults_of(
    "llada_jax/masks.py",
    "tests/test_masks.py "
    "tests/models/test_transformer.py::test_every_token_sees_every_other_unless_causal",
    (
        "causal attention without the position itself",
        "(key_index <= query_index)",
        "(key_index < query_index)",
    ),
    (
        "attention across documents",
        "allowed = query_segment == key_segment",
        "allowed = (query_segment > 0) == (key_segment > 0)",
    ),
    (
        "a block sees the next one",
        "key_index // mask.block_length <= query_index // mask.block_length",
        "key_index // mask.block_length <= query_index // mask.block_length + 1",
    ),
)

FLOPS = faults_of(
    "llada_jax/models/flops.py",
    "tests/models/test_flops.py",
    ("attention counted half", "12 * num_layers", "6 * num_layers"),
    ("causal attention counted whole", "attention / 2 if causal", "attention if causal"),
)

SHARDING = faults_of(
    "llada_jax/cluster/sharding.py",
    "tests/cluster/test_sharding.py tests/training/test_resources.py",
    (
        "the batch on the data axis alone",
        '"act_batch": ("data", "fsdp", "expert")',
        '"act_batch": ("data",)',
    ),
    ("heads replicated", '"act_heads": "tensor"', '"act_heads": None'),
    ("parameters not split", '"embed": ("fsdp", "sequence")', '"embed": None'),
)

SPLIT_ROWS = faults_of(
    "llada_jax/models/split_rows.py",
    "tests/models/test_split_rows.py",
    ("every device attends from the first columns", "start=columns_T[0])", "start=0)"),
    ("rows are brought together the dearer way", "return min(", "return max("),
)

PRODUCTS = faults_of(
    "llada_jax/models/products.py",
    "tests/models/test_precision.py",
    (
        "gradient of the logits multiplied in float32",
        "grad, rows = grad.astype(x.dtype), ",
        "grad, rows = grad, ",
    ),
)

BY_HEAD = faults_of(
    "llada_jax/models/by_head.py",
    "tests/models/test_attention.py",
    ("gradients keep their mean", "(grad_weights_1TS - mean_1T[..., None])", "grad_weights_1TS"),
)

ATTENTION = faults_of(
    "llada_jax/models/attention.py",
    "tests/models/test_cudnn_attention.py",
    (
        "cuDNN has rows without queries",
        "query_lengths = jnp.maximum(query_lengths, 1)",
        "pass",
    ),
    (
        "keys of a canvas stay behind its padding",
        "jnp.argsort(~is_real_BS, axis=1, stable=True)",
        "jnp.broadcast_to(jnp.arange(S), is_real_BS.shape)",
        "tests/models/test_canvas_attention.py",
    ),
    (
        "a window sees padding",
        "(segment_ids_BT > 0)[:, None, None], (B, 1, T, S)",
        "(segment_ids_BT >= 0)[:, None, None], (B, 1, T, S)",
        "tests/models/test_canvas_attention.py",
    ),
)

LAYERS = faults_of(
    "llada_jax/models/layers.py",
    "tests/models/test_layers.py",
    ("a cache of the first layer for all", "parts[number],", "parts[0],"),
)
