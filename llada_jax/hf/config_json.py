"""config.json of Hugging Face checkpoints: read into an Architecture, and written from one.

A layout is chosen, written and read by the keys of config.json. What the network cannot express is
refused by key and value, before any weight is read: a checkpoint that loads and computes something
else would be the worst outcome.
"""

from llada_jax import schemas
from llada_jax.errors import UserError, did_you_mean
from llada_jax.models.transformer import Architecture

WRITTEN = ("llada", "illada")
READ = (*WRITTEN, "llama", "qwen2", "qwen3")

# Our own key of the layout illada, which unlike llada has none for ids next to one for rows. It is
# written where no tokenizer says how many ids there are.
UNPADDED = "unpadded_vocab_size"


# ---- config.json -> ours


def layout_of(hf_config: dict) -> str:
    """Returns the layout of a config.json, one of READ.

    Raises:
        UserError: a mixture of experts, or another network.
    """
    kind = hf_config.get("model_type")
    experts = [
        key
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
        if hf_config.get(key)
    ]
    # LLaDA-MoE calls itself "llada" too; only its keys show what it is.
    if experts or "moe" in str(kind).lower():
        raise UserError(
            f"config.json: model_type={kind!r}"
            + "".join(f" with {key}={hf_config[key]}" for key in experts[:1])
            + " is a mixture of experts, which this network is not; give a dense checkpoint."
        )
    if kind not in READ:
        raise UserError(
            f"config.json: model_type={kind!r} is another network; give one of {', '.join(READ)}."
        )
    return kind


def architecture_from(hf_config: dict) -> Architecture:
    """Returns the Architecture that a config.json describes.

    Raises:
        UserError: a key is missing, or asks for what the network does not have.
    """
    layout = layout_of(hf_config)
    schemas.check(hf_config, schemas.ModelConfig, file="config.json")
    a = _from_llada(hf_config) if layout == "llada" else _from_llama(hf_config)
    if a.num_heads % a.num_kv_heads:
        raise UserError(
            f"config.json: {a.num_heads} heads are not a multiple of {a.num_kv_heads} key/value "
            "heads; the file is damaged."
        )
    if a.head_dim % 2:
        raise UserError(
            f"config.json: heads of width {a.head_dim} cannot be rotated; the file is damaged."
        )
    _check_ids(hf_config, a.vocab_size)
    return a


def _check_ids(hf_config: dict, num_rows: int) -> None:
    """Raises UserError for a special id without a row in the embedding, and for a mask that is
    also another token.
    """
    for key in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
        value = hf_config.get(key)
        for i in value if isinstance(value, list) else [value]:
            if i is not None and i >= num_rows:
                raise UserError(
                    f"config.json: {key}={value} is not an id of the embedding, which has "
                    f"{num_rows} rows; fetch the file again."
                )
    mask = hf_config.get("mask_token_id")
    eos = hf_config.get("eos_token_id")
    if mask is not None and mask in (eos if isinstance(eos, list) else [eos]):
        raise UserError(
            f"config.json: mask_token_id={mask} and eos_token_id={eos} are the same token; fetch "
            "the file again."
        )


def unpadded_vocabulary(hf_config: dict, num_rows: int) -> int:
    """Returns how many ids the vocabulary has, where config.json states both them and the rows
    of the embedding; otherwise the number of rows.
    """
    key = "vocab_size" if layout_of(hf_config) == "llada" else UNPADDED
    return min(hf_config.get(key) or num_rows, num_rows)


def _need(hf_config: dict, *keys: str) -> None:
    """Raises UserError where a key is absent."""
    missing = [key for key in keys if hf_config.get(key) is None]
    if missing:
        raise UserError(
            f"config.json has no {', '.join(missing)}; fetch the whole file: what it does not "
            "state cannot be guessed."
        )


def _refuse(hf_config: dict, possible: dict[str, tuple]) -> None:
    """Raises UserError for a key whose value the network cannot express; the first value is that of
    an absent key.
    """
    for key, values in possible.items():
        value = hf_config.get(key, values[0])
        if value not in values:
            raise UserError(
                f"config.json: {key}={value!r} is not possible here, only "
                f"{' or '.join(map(repr, values))}; this checkpoint cannot be used."
            )


def _from_llada(hf_config: dict) -> Architecture:
    vocab_key = "vocab_size" if hf_config.get("embedding_size") is None else "embedding_size"
    _need(hf_config, vocab_key, "d_model", "n_heads", "n_layers", "mlp_hidden_size")
    _need(hf_config, "rope_theta", "rms_norm_eps")
    _need(hf_config, "weight_tying", "block_type", "activation_type", "layer_norm_type", "rope")
    _refuse(
        hf_config,
        {
            "block_type": ("llama",),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "alibi": (False,),
            "block_group_size": (1,),
            "include_bias": (False,),
            "include_qkv_bias": (False, None),
            "bias_for_layer_norm": (False, None),
            "layer_norm_with_affine": (True,),
            "input_emb_norm": (False,),
            "attention_layer_norm_with_affine": (True,),
            "scale_logits": (False,),
            "rope_scaling": (None,),
        },
    )
    heads = hf_config["n_heads"]
    # multi_query_attention is the older way to say it, with null for "see n_kv_heads"
    kv_heads = 1 if hf_config.get("multi_query_attention") else hf_config.get("n_kv_heads") or heads
    return Architecture(
        vocab_size=hf_config[vocab_key],
        num_layers=hf_config["n_layers"],
        d_model=hf_config["d_model"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(hf_config["d_model"], heads),
        d_ff=hf_config["mlp_hidden_size"],
        rope_theta=float(hf_config["rope_theta"]),
        norm_eps=hf_config["rms_norm_eps"],
        tie_embeddings=hf_config["weight_tying"],
        qk_norm="full" if hf_config.get("attention_layer_norm") else "none",
    )


# What transformers takes where a Llama-style config.json is silent, where it differs from "no such
# thing".
SILENT_HEAD_DIM = {"qwen3": 128}
BIAS = {"none": "none", "qkv": "qkv", "qkvo": "qkvo", True: "qkvo", False: "none", None: "none"}


def _from_llama(hf_config: dict) -> Architecture:
    layout = layout_of(hf_config)
    _need(
        hf_config,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    if layout == "illada":
        _need(hf_config, "rope_theta", "tie_word_embeddings")
    rope_theta, rope_scaling = _rope(hf_config)
    _refuse(
        hf_config,
        {
            "hidden_act": ("silu",),
            "mlp_bias": (False,),
            "use_sliding_window": (False, None),
            "partial_rotary_factor": (1.0, None),
            "attention_bias": tuple(BIAS)[::-1],
            "qk_norm": ("none", "per_head", "full"),
            "output_shift": (False, True),
        },
    )
    if odd := sorted(set(hf_config.get("layer_types") or ()) - {"full_attention"}):
        raise UserError(
            f"config.json: layer_types holds {odd[0]!r}; only full_attention is possible here."
        )
    width, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    return Architecture(
        vocab_size=hf_config["vocab_size"],
        num_layers=hf_config["num_hidden_layers"],
        d_model=width,
        num_heads=heads,
        num_kv_heads=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config.get("head_dim")
        or SILENT_HEAD_DIM.get(layout)
        or _head_dim(width, heads),
        d_ff=hf_config["intermediate_size"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=hf_config["rms_norm_eps"],
        tie_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        qk_norm="per_head" if layout == "qwen3" else hf_config.get("qk_norm", "none"),
        attention_bias="qkv" if layout == "qwen2" else BIAS[hf_config.get("attention_bias", False)],
        output_shift=hf_config.get("output_shift", False),
    )


def _head_dim(width: int, heads: int) -> int:
    if width % heads:
        raise UserError(
            f"config.json: a width of {width} is not a multiple of {heads} heads; the file is "
            "damaged."
        )
    return width // heads


# What "llama3" is written with, in the order of Architecture.rope_scaling.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(hf_config: dict) -> tuple[float, tuple[float, ...]]:
    """Returns rope_theta and rope_scaling; transformers 5 writes both into `rope_parameters`, 4
    uses `rope_scaling` and the key next to it.

    Frequencies that are rescaled in another way than Llama 3.1's (yarn, linear, dynamic, longrope)
    are refused.
    """
    key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    described = hf_config.get(key) or {}
    kind = described.get("rope_type", described.get("type", "default"))
    if kind not in ("default", "llama3") or any(
        isinstance(value, dict) for value in described.values()
    ):
        raise UserError(
            f"config.json: {key}={described!r} is not possible here, only unscaled rotary "
            "frequencies and those of Llama 3.1 (rope_type llama3); this checkpoint cannot be "
            "used."
        )
    if described.get("partial_rotary_factor", 1.0) != 1.0:
        factor = described["partial_rotary_factor"]
        raise UserError(
            f"config.json: partial_rotary_factor={factor} is not possible here, only 1.0."
        )
    theta = described.get("rope_theta", hf_config.get("rope_theta", 10_000.0))
    # Its code reads the key next to the copy and not the copy.
    if layout_of(hf_config) == "illada":
        theta = hf_config["rope_theta"]
    if kind == "default":
        return float(theta), ()
    _need(described, *LLAMA3)
    return float(theta), tuple(float(described[name]) for name in LLAMA3)


# ---- ours -> config.json


def cannot_hold(layout: str, a: Architecture) -> str:
    """Returns why a written layout cannot hold an Architecture; "" when it can."""
    if layout == "illada":
        return ""
    reasons = {
        f"head_dim={a.head_dim} is not d_model / num_heads = {a.d_model} / {a.num_heads}": (
            a.head_dim * a.num_heads != a.d_model
        ),
        "qk_norm='per_head' has no key in it": a.qk_norm == "per_head",
        f"attention_bias={a.attention_bias!r} has no key in it": a.attention_bias != "none",
        "output_shift=True has no key in it": a.output_shift,
        f"rope_scaling={a.rope_scaling} has no key in it": bool(a.rope_scaling),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def choose_layout(a: Architecture, wanted: str = "auto") -> str:
    """Returns the layout in which an Architecture is written: "llada" where that can hold it,
    otherwise "illada".

    Raises:
        UserError: the wanted layout is unknown, or cannot hold it.
    """
    if wanted == "auto":
        return "illada" if cannot_hold("llada", a) else "llada"
    if wanted not in WRITTEN:
        raise UserError(
            f"Layout {wanted!r} cannot be written.{did_you_mean(wanted, ('auto', *WRITTEN))}"
        )
    if reason := cannot_hold(wanted, a):
        raise UserError(f"Layout {wanted!r} cannot hold this model: {reason}; leave it at auto.")
    return wanted


def hf_config(
    a: Architecture,
    layout: str,
    *,
    mask_id: int,
    eos_id: int,
    bos_id: int,
    pad_id: int,
    max_sequence_length: int,
    dtype: str,
    eot_id: int | None = None,
    num_ids: int | None = None,
    source: dict | None = None,
) -> dict:
    """Returns config.json, every key written: the published classes have the defaults of another
    network.

    Args:
        layout: "llada" or "illada".
        max_sequence_length: in tokens.
        dtype: of the tensors in the file, "float32" or "bfloat16".
        eot_id: of the end of a turn, at which the sampler of the export ends a text too; None where
            there is none.
        num_ids: of the vocabulary, above which no sampler goes; None: every row of the embedding. A
            source of a layout that is written may state more, which its tokenizer need not fill.
        source: the config.json that the model was imported from, of any layout. Of the same layout,
            keys that say nothing about the network (who wrote it, dropouts, initialisation) are
            carried through.
    """
    ids = {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "mask_token_id": mask_id,
    }
    if eot_id is not None:
        ids["eot_token_id"] = eot_id
    write = {"llada": _to_llada, "illada": _to_illada}[layout]
    silent, stated = write(a, max_sequence_length)
    carried = dict(source) if source and source.get("model_type") == layout else {}
    # The first two are stated again below where they are needed; the third is transformers 5's name
    # for torch_dtype, which it reads in place of it.
    for key in ("rope_parameters", UNPADDED, "dtype"):
        carried.pop(key, None)
    if source and layout_of(source) in WRITTEN:
        num_ids = max(num_ids or 0, unpadded_vocabulary(source, a.vocab_size))
    if num_ids is not None and num_ids < a.vocab_size:
        stated["vocab_size" if layout == "llada" else UNPADDED] = num_ids
    return dict(sorted({**silent, **carried, **stated, **ids, "torch_dtype": dtype}.items()))


def _auto_map(stem: str, config: str, model: str) -> dict:
    both = f"modeling_{stem}.{model}"
    return {
        "AutoConfig": f"configuration_{stem}.{config}",
        "AutoModel": both,
        "AutoModelForCausalLM": both,
    }


def _to_llada(a: Architecture, max_sequence_length: int) -> tuple[dict, dict]:
    """Returns the keys that say nothing about the network, at their published values, and those
    that do.
    """
    silent = {
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "flash_attention": False,
        "alibi_bias_max": 8.0,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "precision": "amp_bf16",
        "transformers_version": "4.49.0",
        "use_cache": False,
    }
    stated = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": a.qk_norm == "full",
        "attention_layer_norm_with_affine": True,
        "auto_map": _auto_map("llada", "LLaDAConfig", "LLaDAModelLM"),
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": a.d_model,
        "embedding_size": a.vocab_size,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": max_sequence_length,
        "mlp_hidden_size": a.d_ff,
        "model_type": "llada",
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
        "n_layers": a.num_layers,
        "rms_norm_eps": a.norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": a.rope_theta,
        "scale_logits": False,
        "vocab_size": a.vocab_size,
        "weight_tying": a.tie_embeddings,
    }
    return silent, stated


def _to_illada(a: Architecture, max_sequence_length: int) -> tuple[dict, dict]:
    """Returns the same for the Llama-style names.

    Keys that the published iLLaDA lacks are written only where they differ from its network, so
    that its own code reads every export that it can compute.
    """
    silent = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "transformers_version": "4.49.0",
        "use_cache": False,
    }
    stated = {
        "architectures": ["ILLaDAModelLM"],
        "auto_map": _auto_map("illada", "ILLaDAConfig", "ILLaDAModelLM"),
        "hidden_act": "silu",
        "hidden_size": a.d_model,
        "intermediate_size": a.d_ff,
        "max_position_embeddings": max_sequence_length,
        "model_type": "illada",
        "num_attention_heads": a.num_heads,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_kv_heads,
        "rms_norm_eps": a.norm_eps,
        "rope_scaling": None,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tie_embeddings,
        "vocab_size": a.vocab_size,
    }
    if a.head_dim * a.num_heads != a.d_model:
        stated["head_dim"] = a.head_dim
    # Not under the name rope_scaling: next to one that is not null, transformers 5.23 does not
    # read a tokenizer.
    if a.rope_scaling:
        # transformers takes a whole number of tokens.
        numbers = (*a.rope_scaling[:-1], round(a.rope_scaling[-1]))
        stated["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": a.rope_theta,
            **dict(zip(LLAMA3, numbers, strict=True)),
        }
    if a.attention_bias != "none":
        stated["attention_bias"] = a.attention_bias
    if a.qk_norm != "none":
        stated["qk_norm"] = a.qk_norm
    if a.output_shift:
        stated["output_shift"] = True
    return silent, stated
