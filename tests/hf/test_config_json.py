"""config.json in both directions: what is refused, and what each version of transformers writes."""

import dataclasses

import pytest
from support.hf_directories import SMALL, causal_config, our_config

from llada_jax.errors import UserError
from llada_jax.hf.config_json import (
    architecture_from,
    choose_layout,
    hf_config,
    unpadded_vocabulary,
)

PUBLISHED = our_config("llada", SMALL)
LLAMA = causal_config("llama", SMALL)
IDS = {"mask_id": 257, "eos_id": 256, "bos_id": 256, "pad_id": 256, "max_sequence_length": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3(**changes) -> dict:
    """The config.json of Llama 3.2, but for the sizes; None leaves a key out."""
    scaling = {key: value for key, value in {**LLAMA3, **changes}.items() if value is not None}
    return {**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "model_type=None"),
        (
            {"model_type": "mamba"},
            "'mamba' is another network; give one of llada, illada, llama, qwen2, qwen3",
        ),
        (
            {"model_type": "llada", "num_experts": 64, "hidden_size": 2048},
            "num_experts=64 is a mixture of experts",
        ),
        ({"model_type": "llama", "num_local_experts": 8}, "num_local_experts=8 is a mixture"),
        ({"model_type": "llada", "n_routed_experts": 8}, "n_routed_experts=8 is a mixture"),
        ({"model_type": "LLaDA_MoE"}, "'LLaDA_MoE' is a mixture of experts"),
        ({**PUBLISHED, "eos_token_id": [256, SMALL.vocab_size]}, "is not an id of the embedding"),
        ({"model_type": "lladamoe"}, "'lladamoe' is a mixture of experts"),
        ({"model_type": "llada2_moe", "num_experts": 256}, "mixture of experts"),
        ({"model_type": "qwen3_moe"}, "mixture of experts"),
        ({"model_type": "llada"}, "config.json has no vocab_size, d_model, n_heads"),
        ({**PUBLISHED, "weight_tying": None}, "has no weight_tying"),
        ({**PUBLISHED, "n_layers": "three"}, "n_layers='three' must be a whole number"),
        ({**PUBLISHED, "block_type": "sequential"}, "block_type='sequential'"),
        ({**PUBLISHED, "activation_type": "swiglu"}, "activation_type='swiglu'"),
        ({**PUBLISHED, "layer_norm_type": "default"}, "layer_norm_type='default'"),
        ({**PUBLISHED, "rope": False}, "rope=False"),
        ({**PUBLISHED, "alibi": True}, "alibi=True"),
        ({**PUBLISHED, "include_bias": True}, "include_bias=True"),
        ({**PUBLISHED, "include_qkv_bias": True}, "include_qkv_bias=True"),
        ({**PUBLISHED, "scale_logits": True}, "scale_logits=True"),
        ({**PUBLISHED, "input_emb_norm": True}, "input_emb_norm=True"),
        ({**PUBLISHED, "n_heads": 7}, "64 is not a multiple of 7 heads"),
        ({"model_type": "llama"}, "has no vocab_size, hidden_size"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias=True"),
        (
            llama3(rope_type="yarn"),
            "rope_parameters=.*yarn.* only unscaled rotary frequencies and those of Llama 3.1",
        ),
        (llama3(rope_type="linear"), "rope_parameters=.*linear"),
        (llama3(rope_type="dynamic"), "rope_parameters=.*dynamic"),
        (llama3(rope_type="longrope"), "rope_parameters=.*longrope"),
        (
            {**LLAMA, "rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling=.*yarn",
        ),
        (llama3(factor=None), "has no factor; fetch the whole file"),
        (
            llama3(low_freq_factor=None, original_max_position_embeddings=None),
            "no low_freq_factor, original_max_position",
        ),
        (llama3(factor=0), "factor=0 must be greater than 0"),
        (llama3(high_freq_factor=-4.0), "high_freq_factor=-4.0 must be greater than 0"),
        (llama3(low_freq_factor="1"), "low_freq_factor='1' must be a number"),
        (
            llama3(original_max_position_embeddings=float("nan")),
            "original_max_position_embeddings=nan must be a finite",
        ),
        (
            llama3(low_freq_factor=4.0),
            r"rope_scaling=\(32.0, 4.0, 4.0, 8192.0\) must be .* second is less than the third",
        ),
        (llama3(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (
            {**PUBLISHED, "rope_scaling": LLAMA3},
            "rope_scaling=.*llama3.* is not possible here, only None",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters="),
        ({**causal_config("qwen2", SMALL), "use_sliding_window": True}, "use_sliding_window=True"),
        (
            {
                **causal_config("qwen3", SMALL),
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "'sliding_attention'",
        ),
        ({**our_config("illada", SMALL), "rope_theta": None}, "has no rope_theta"),
        ({**our_config("illada", SMALL), "qk_norm": "half"}, "only 'none' or 'per_head' or 'full'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_network_cannot_express_is_refused_by_key_and_value(config, says):
    with pytest.raises(UserError, match=says):
        architecture_from(config)


def test_what_a_layout_leaves_out_is_what_its_authors_take():
    older = {**PUBLISHED, "n_kv_heads": None}
    assert architecture_from(older).num_kv_heads == SMALL.num_heads
    assert architecture_from({**older, "multi_query_attention": True}).num_kv_heads == 1
    for layout, expected in (("qwen2", SMALL.d_model // SMALL.num_heads), ("qwen3", 128)):
        config = causal_config(layout, SMALL)
        config.pop("head_dim", None)
        assert architecture_from(config).head_dim == expected


def test_no_more_ids_are_read_than_the_embedding_has_rows():
    assert unpadded_vocabulary({**PUBLISHED, "vocab_size": 300}, 320) == 300
    assert unpadded_vocabulary({**PUBLISHED, "vocab_size": 400}, 320) == 320
    assert unpadded_vocabulary(our_config("illada", SMALL), 320) == 320


def test_the_rotary_base_is_found_where_each_version_of_transformers_writes_it():
    new = causal_config("llama", SMALL, rope_parameters={"rope_theta": 7e4, "rope_type": "default"})
    old = {**causal_config("llama", SMALL, rope_theta=7e4, rope_scaling=None)}
    del old["rope_parameters"]
    assert (
        architecture_from(new)
        == architecture_from(old)
        == dataclasses.replace(SMALL, rope_theta=7e4)
    )
    del old["rope_theta"]
    assert architecture_from(old).rope_theta == 10_000.0  # as LlamaConfig


@pytest.mark.parametrize("layout", ["llama", "qwen2", "qwen3"])
def test_the_scaling_of_llama_3_is_found_where_each_version_of_transformers_writes_it(layout):
    unscaled = causal_config(layout, SMALL)
    del unscaled["rope_parameters"]
    wanted = (32.0, 1.0, 4.0, 8192.0)
    older = {
        "type": "llama3",
        **{key: value for key, value in LLAMA3.items() if key != "rope_type"},
    }
    for written in (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": older},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": None},
    ):
        a = architecture_from({**unscaled, **written})
        assert (a.rope_theta, a.rope_scaling) == (5e5, wanted), written
        assert all(type(number) is float for number in a.rope_scaling)


def test_a_scaling_is_exported_as_transformers_reads_it_and_comes_back_however_it_is_saved():
    a = dataclasses.replace(SMALL, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192.0))
    written = our_config("illada", a)
    assert written["rope_parameters"] == {**LLAMA3, "rope_theta": 5e5}
    assert type(written["rope_parameters"]["original_max_position_embeddings"]) is int
    assert written["rope_scaling"] is None
    assert "rope_parameters" not in our_config("illada", SMALL)
    # the shipped code reads the rope_theta next to it, which may have been changed
    saved = {**written, "rope_parameters": {**LLAMA3, "rope_theta": 1.0}}
    older = {**written, "rope_parameters": None, "rope_scaling": LLAMA3}
    assert architecture_from(saved) == architecture_from(older) == a
    again = hf_config(a, "illada", **IDS, dtype="float32", source=saved)
    assert again == written
    with pytest.raises(
        UserError, match=r"'llada' cannot hold this model: rope_scaling=\(32.0, .*\) has no key"
    ):
        choose_layout(a, "llada")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_the_files_is_not_overruled_by_that_of_the_source(dtype):
    """transformers 5 writes `dtype`, and reads it before `torch_dtype`."""
    source = our_config("llada", SMALL, dtype="float16", torch_dtype="float16", init_std=0.5)
    written = hf_config(SMALL, "llada", **IDS, dtype=dtype, source=source)
    assert (written["torch_dtype"], written["init_std"]) == (dtype, 0.5)
    assert "dtype" not in written


@pytest.mark.parametrize("layout", ["llada", "illada"])
@pytest.mark.parametrize("other", ["llada", "illada"])
def test_the_vocabulary_of_the_source_is_stated_in_either_layout(layout, other):
    key = {"llada": "vocab_size", "illada": "unpadded_vocab_size"}
    source = our_config(other, SMALL, **{key[other]: 300})
    written = hf_config(SMALL, layout, **IDS, dtype="float32", source=source)
    assert written[key[layout]] == 300
