"""The files load with torch and transformers alone, and refuse what they cannot hold."""

import ast
import importlib
import json
import math

import pytest
import torch
from exported import FILES, LLAMA3, SHIPPED, VARIANTS, seeded
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def test_the_files_need_torch_and_transformers_alone():
    for name in ("llada_jax", "jax", "flax"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    for file in {file for files in FILES.values() for file in files}:
        for node in ast.walk(ast.parse((SHIPPED / file).read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= {"torch"}, file
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in ("torch", "transformers"), (
                    file
                )


def test_both_auto_classes_load_every_weight(directory):
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded, info = auto.from_pretrained(
            directory, trust_remote_code=True, output_loading_info=True
        )
        assert type(loaded).__name__ == "LLaDAModelLM"
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        weights = load_file(directory / "model.safetensors")
        assert loaded.state_dict().keys() == weights.keys()
        assert all(
            torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items()
        )


def test_the_config_reads_every_published_key_and_has_the_standard_names(directory):
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    for key, value in json.loads((directory / "config.json").read_text()).items():
        if key not in ("transformers_version", "_attn_implementation_autoset"):
            assert getattr(config, key) == value, key
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 3)
    assert (
        config.intermediate_size,
        config.num_key_value_heads,
        config.max_position_embeddings,
    ) == (176, 4, 128)
    assert config.tie_word_embeddings is False
    published = type(config)()  # nothing given: LLaDA-8B
    assert (published.d_model, published.n_layers, published.mlp_hidden_size) == (4096, 32, 12288)
    assert (published.mask_token_id, published.eos_token_id, published.vocab_size) == (
        126336,
        126081,
        126464,
    )
    assert (published.rope_theta, published.weight_tying, published.tie_word_embeddings) == (
        500000.0,
        False,
        False,
    )
    assert type(config)(n_kv_heads=None, multi_query_attention=True).n_kv_heads == 1
    derived = type(config)(
        n_kv_heads=None, n_heads=16, mlp_hidden_size=None, embedding_size=None, vocab_size=7
    )
    assert (derived.n_kv_heads, derived.mlp_hidden_size, derived.embedding_size) == (16, 16384, 7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_saving_and_loading_again_changes_nothing(make, tmp_path, variant, shards):
    original = make(variant)
    limit = "1GB" if shards == 1 else "20KB"
    original.save_pretrained(tmp_path / "saved", max_shard_size=limit)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 1 or shards > 1
    again, info = AutoModel.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.state_dict().keys() == original.state_dict().keys()
    tokens = torch.arange(24).reshape(2, 12)
    assert torch.equal(again.eval()(tokens).logits, original(tokens).logits)
    keys = set(original.config.to_dict()) - {"transformers_version", "dtype", "torch_dtype"}
    ours = {key for key in keys if not key.startswith("_")}
    assert {key: getattr(again.config, key) for key in ours} == {
        key: getattr(original.config, key) for key in ours
    }


@pytest.mark.parametrize("variant", ["llada, tied, QK-norm", "illada, tied, QK-norm per head"])
def test_tied_models_have_one_matrix_and_one_tensor_for_it(make, tmp_path, variant):
    tied = make(variant)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    tied.tie_weights()
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert not [
        name for name in tied.state_dict() if "lm_head" in name or "transformer.ff_out" in name
    ]
    tokens = torch.arange(12)[None]
    tied.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    if variant.startswith("illada"):  # files that hold the copy all the same exist, and load
        tensors["lm_head.weight"] = tied.get_input_embeddings().weight.detach().clone()
        save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again(tokens).logits, tied(tokens).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vocabulary_can_be_resized(make, tmp_path, variant):
    # of the 40 rows, four are those of no token
    resized = make(variant, **{"unpadded_vocab_size": 36} if variant == "illada" else {})
    tokens = torch.arange(12)[None]
    before = resized(tokens).logits
    resized.resize_token_embeddings(44, mean_resizing=False)
    logits = resized(tokens).logits
    torch.testing.assert_close(logits[..., :40], before, atol=1e-6, rtol=0)
    assert logits.shape[-1] == 44
    assert logits.abs().max() < 10
    if variant == "illada":
        assert resized.config.unpadded_vocab_size is None
    resized.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(again.eval()(tokens).logits, logits)


@pytest.mark.parametrize("variant", ["llada", "illada"])
def test_a_new_model_has_the_published_initialisation(make, variant):
    sizes = {
        "llada": {"d_model": 256, "mlp_hidden_size": 320, "vocab_size": 600, "embedding_size": 600},
        "illada": {"hidden_size": 256, "head_dim": 48, "intermediate_size": 320, "vocab_size": 600},
    }
    made = make(variant, **sizes[variant])
    cut = 0.98658  # standard deviation of a unit normal truncated at 3
    for name, weight in made.named_parameters():
        if weight.ndim == 1:
            continue
        std = weight.shape[1] ** -0.5
        if any(
            part in name
            for part in ("attn_out", "blocks.0.ff_out", "blocks.1.ff_out", "o_proj", "down_proj")
        ):
            std /= math.sqrt(2 * (int(name.split(".")[3 if variant == "llada" else 2]) + 1))
        assert weight.std().item() == pytest.approx(std * cut, rel=0.02), name
        assert weight.abs().max() <= 3 * std, name
    # unit variance of the logits: the loss starts near log V + 1/2
    made = make(variant, **sizes[variant])
    tokens = torch.randint(600, (16, 64), generator=seeded(0))
    nll = F.cross_entropy(made(torch.full_like(tokens, 39)).logits.flatten(0, 1), tokens.flatten())
    assert nll.item() == pytest.approx(math.log(600) + 0.5, abs=0.35)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("layer_norm_type", "default"),
        ("block_type", "sequential"),
        ("activation_type", "swiglu"),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("scale_logits", True),
        ("residual_dropout", 0.1),
        ("input_emb_norm", True),
        ("rope_full_precision", False),
        ("init_fn", "normal"),
        ("block_group_size", 4),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
    ],
)
def test_what_llada_files_cannot_express_is_refused_by_key(make, key, value):
    with pytest.raises(ValueError, match=rf"{key}={value!r} is not supported"):
        make("llada", **{key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "yarn"},
        {"rope_type": "default"},
        {"factor": 0.0},
        {"low_freq_factor": None},
        {"high_freq_factor": "4"},
        {"high_freq_factor": 0.25},
        {"original_max_position_embeddings": -1},
    ],
    ids=str,
)
def test_a_scaling_of_the_frequencies_that_is_not_llama_3_s_is_refused_by_value(make, changes):
    with pytest.raises(
        ValueError,
        match=r"rope_parameters=\{.* is not supported by ILLaDAModelLM; .* 'llama3' with",
    ):
        make("illada", rope_scaling=LLAMA3 | changes)


def test_the_llada_files_refuse_a_scaling(make):
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(
            ValueError, match=r"rope_(scaling|parameters)=\{.* is not supported by LLaDAModelLM"
        ):
            # without which transformers 5 refuses it itself
            make("llada", **{key: LLAMA3 | {"rope_theta": 5e5}})


def test_a_scaling_is_found_however_it_is_written_and_saved(make, tmp_path):
    scaled = make("illada, scaled frequencies")
    tokens = torch.randint(38, (2, 24), generator=seeded(0))
    logits = scaled(tokens).logits
    older = {
        "type": "llama3",
        **{key: value for key, value in LLAMA3.items() if key != "rope_type"},
    }
    for written in (
        {"rope_scaling": older},
        {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 7.0}},
    ):
        again = make("illada", rope_theta=100.0, **written)
        again.load_state_dict(scaled.state_dict())
        assert torch.equal(again(tokens).logits, logits)
    scaled.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["rope_theta"] == 100.0
    assert saved["rope_parameters"] == LLAMA3 | {"rope_theta": 100.0}
    assert not saved.get("rope_scaling")  # with which transformers 5 reads no tokenizer
    plain = make("illada", rope_theta=100.0, rope_scaling=None)
    plain.load_state_dict(scaled.state_dict())
    assert (plain(tokens).logits - logits).abs().max() > 0.05


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("qk_norm", "layer"), ("attention_bias", "all"), ("mlp_bias", True)],
)
def test_what_illada_files_cannot_express_is_refused_by_key(make, key, value):
    with pytest.raises(ValueError, match=rf"{key}={value!r} is not supported"):
        make("illada", **{key: value})
