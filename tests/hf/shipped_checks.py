"""The PyTorch files of an export, as a user meets them: in a process with transformers and without
this package.

test_shipped.py runs this file with pytest in a fresh process for every version of transformers.
"""

import ast
import copy
import importlib
import inspect
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "fixtures" / "llada_official_tiny"
SHIPPED = HERE.parents[1] / "llada_jax" / "hf" / "shipped"
FILES = {
    layout: (f"configuration_{layout}.py", f"modeling_{layout}.py", "masked_diffusion.py")
    for layout in ("llada", "illada")
}
FACTS = json.loads((PUBLISHED / "expected.json").read_text())
MASK, EOS = FACTS["mask_token_id"], FACTS["eos_token_id"]
SMALL = {
    "llada": {
        "model_type": "llada",
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": 40,
        "embedding_size": 40,
        "mask_token_id": 39,
        "eos_token_id": 38,
        "pad_token_id": 38,
    },
    "illada": {
        "model_type": "illada",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 40,
        "mask_token_id": 39,
        "eos_token_id": 38,
        "pad_token_id": 38,
    },
}
# with theta = 100 and heads of 8, wavelengths of 6 (kept), 20 (mixed), 63 and 199 tokens
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 10,
}
VARIANTS = {
    "llada": {},
    "llada, tied, QK-norm": {"weight_tying": True, "attention_layer_norm": True},
    "illada": {"tie_word_embeddings": False},
    "illada, tied, QK-norm per head": {"tie_word_embeddings": True, "qk_norm": "per_head"},
    "illada, scaled frequencies": {
        "rope_theta": 100.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": False,
    },
    "illada, full QK-norm, biases, shift": {
        "qk_norm": "full",
        "attention_bias": "qkvo",
        "output_shift": True,
    },
}
seeded = torch.Generator().manual_seed


def expected(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(PUBLISHED / "expected.npz")[name])


def export_directory(directory: Path, layout: str, config: dict) -> Path:
    """A directory as `llada-jax export` leaves it, but for the weights."""
    directory.mkdir()
    for file in FILES[layout]:
        shutil.copyfile(SHIPPED / file, directory / file)
    module, stem = f"modeling_{layout}", {"llada": "LLaDA", "illada": "ILLaDA"}[layout]
    auto_map = {"AutoConfig": f"configuration_{layout}.{stem}Config"}
    auto_map |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"{module}.{stem}ModelLM")
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The published fixture with our files beside it."""
    config = json.loads((PUBLISHED / "config.json").read_text())
    directory = export_directory(tmp_path_factory.mktemp("exports") / "published", "llada", config)
    shutil.copyfile(PUBLISHED / "model.safetensors", directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def model(directory):
    return AutoModel.from_pretrained(directory, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a small model from a config with changes, freshly initialised."""
    root = tmp_path_factory.mktemp("small")
    numbers = itertools.count()

    def make(variant: str, **changes):
        layout = variant.split(",")[0]
        config = SMALL[layout] | VARIANTS[variant] | changes
        config = AutoConfig.from_pretrained(
            export_directory(root / f"model{next(numbers)}", layout, config), trust_remote_code=True
        )
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        with torch.no_grad():  # ones and zeros would hide a norm or a bias that is not applied
            for parameter in made.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape)
        return made.eval()

    return make


def shared(model):
    """The module masked_diffusion that came with the model."""
    return sys.modules[
        next(c.__module__ for c in type(model).__mro__ if c.__name__ == "MaskedDiffusionLM")
    ]


# ---- loading


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
    resized = make(variant)
    tokens = torch.arange(12)[None]
    before = resized(tokens).logits
    resized.resize_token_embeddings(44, mean_resizing=False)
    logits = resized(tokens).logits
    torch.testing.assert_close(logits[..., :40], before, atol=1e-6, rtol=0)
    assert logits.shape[-1] == 44
    assert logits.abs().max() < 10
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


# ---- the network


@torch.no_grad()
def test_logits_equal_the_published_ones(model):
    torch.testing.assert_close(
        model(expected("input_ids")).logits, expected("logits"), atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_logits_of_padded_rows_equal_the_published_ones_at_real_positions(model, dtype):
    attention_mask = expected("attention_mask")
    is_real = attention_mask.bool()
    logits = model(expected("input_ids"), attention_mask=attention_mask.to(dtype)).logits
    assert not is_real.all()
    torch.testing.assert_close(
        logits[is_real], expected("logits_masked")[is_real], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_a_mask_without_padding_is_no_mask(model):
    tokens = expected("input_ids")
    assert torch.equal(
        model(tokens, attention_mask=torch.ones_like(tokens)).logits, model(tokens).logits
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=10, deadline=None)
@given(left=st.integers(0, 5), right=st.integers(0, 5), junk=st.integers(0, 39))
def test_padding_and_what_stands_in_it_change_nothing(make, variant, left, right, junk):
    made = CACHE.setdefault(variant, make(variant))
    tokens = torch.tensor([[1, 2, 3, 39, 5, 39, 7]])
    padded = F.pad(tokens, (left, right), value=junk)
    attention_mask = F.pad(torch.ones_like(tokens), (left, right))
    # beside it, a row of nothing but padding
    both = torch.cat([padded, torch.full_like(padded, junk)])
    logits = made(both, attention_mask=torch.cat([attention_mask, torch.zeros_like(padded)])).logits
    torch.testing.assert_close(logits[:1, left : left + 7], made(tokens).logits, atol=2e-5, rtol=0)
    assert logits.isfinite().all()


CACHE = {}


@torch.no_grad()
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "shift" not in name])
def test_positions_are_what_position_ids_say(make, variant):
    made = make(variant)
    tokens = torch.arange(20).reshape(2, 10)
    logits = made(tokens).logits
    counted = torch.arange(10).expand(2, 10)
    assert torch.equal(made(tokens, position_ids=counted).logits, logits)
    torch.testing.assert_close(
        made(tokens, position_ids=counted + 100).logits, logits, atol=2e-5, rtol=0
    )
    # tokens and positions in another order: the same set of pairs
    order = torch.randperm(10, generator=seeded(0))
    permuted = made(tokens[:, order], position_ids=counted[:, order]).logits
    torch.testing.assert_close(permuted, logits[:, order], atol=2e-5, rtol=0)
    assert (made(tokens, position_ids=counted.flip(1)).logits - logits).abs().max() > 1e-2


@torch.no_grad()
def test_embeddings_may_stand_in_for_tokens_and_every_form_of_output_agrees(model):
    tokens = expected("input_ids")
    output = model(tokens, output_hidden_states=True)
    logits = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(logits, output.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], output.logits)
    assert output.loss is None
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens))
    torch.testing.assert_close(
        model.get_output_embeddings()(output.hidden_states[-1]), output.logits
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_close_to_float32(make, variant):
    made = make(variant)
    tokens = torch.arange(24).reshape(2, 12)
    logits = made(tokens).logits
    made = made.to(torch.bfloat16)
    rounded = made(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - logits).abs().max() < 0.15
    canvas = made.generate_diffusion(tokens, gen_length=4, steps=2)
    assert canvas.shape == (2, 16)
    assert (canvas[:, 12:] != 39).all()


@torch.no_grad()
def test_the_output_shift_moves_every_logit_one_to_the_right(make):
    shifted, plain = make("illada", output_shift=True), make("illada")
    plain.load_state_dict(shifted.state_dict())
    tokens = torch.arange(20).reshape(2, 10)
    logits, own = shifted(tokens).logits, plain(tokens).logits
    torch.testing.assert_close(logits[:, 1:], own[:, :-1])
    torch.testing.assert_close(logits[:, 0], own[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_happens_on_the_device_of_the_model(make, variant, monkeypatch):
    """On a device that is not the default one: "meta", whose tensors have no content and do not mix
    with others.
    """
    made = make(variant).to("meta")
    tokens = torch.ones(2, 12, dtype=torch.int64, device="meta")
    assert made(tokens, position_ids=tokens).logits.device.type == "meta"
    noisy, is_masked, p = shared(made).corrupt(tokens, tokens > 0, mask_id=39, generator=seeded(0))
    assert {noisy.device.type, is_masked.device.type, p.device.type} == {"meta"}
    # whether all of a mask are ones cannot be asked where there are no values
    monkeypatch.setattr(
        type(made), "_is_real", staticmethod(lambda attention_mask: attention_mask != 0)
    )
    for remasking in ("low_confidence", "random"):
        canvas = made.generate_diffusion(
            tokens,
            tokens,
            gen_length=4,
            steps=2,
            temperature=1.0,
            cfg_scale=1.0,
            remasking=remasking,
        )
        assert canvas.device.type == "meta"


# name of the class (and more), arguments of its config, keys of ours
FAMILIES = {
    "Llama": ({"attention_bias": True}, {"attention_bias": "qkvo"}),
    "Llama 3.1": (
        {"rope_theta": 100.0, "rope_scaling": LLAMA3},
        {"rope_theta": 100.0, "rope_scaling": LLAMA3},
    ),
    "Qwen2": (
        {"tie_word_embeddings": True},
        {"attention_bias": "qkv", "tie_word_embeddings": True},
    ),
}
VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
if VERSION >= (4, 51):  # with which Qwen3 came
    FAMILIES["Qwen3"] = (
        {"tie_word_embeddings": True},
        {"qk_norm": "per_head", "tie_word_embeddings": True},
    )
if VERSION < (5, 0):  # transformers 5 names the tensors of an expert otherwise
    FAMILIES["Olmoe"] = ({"num_experts": 1, "num_experts_per_tok": 1}, {"qk_norm": "full"})


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_families_of_transformers_without_their_causal_mask(make, family):
    """Independent code with the same names: GQA, biases, QK-norm per head and (one expert of OLMoE)
    in full.
    """
    theirs, ours = FAMILIES[family]
    sizes = {
        key: SMALL["illada"][key]
        for key in SMALL["illada"]
        if key not in ("model_type", "mask_token_id")
    }
    sizes |= {
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    family = family.split()[0]
    theirs = copy.deepcopy(theirs)  # transformers 5 writes into rope_scaling
    config = getattr(transformers, f"{family}Config")(
        **{**sizes, **theirs}, attn_implementation="eager"
    )
    torch.manual_seed(1)
    real = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in real.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1))
    tensors = {
        name.replace("mlp.experts.0.", "mlp."): tensor for name, tensor in real.state_dict().items()
    }
    tensors = {name: tensor for name, tensor in tensors.items() if "mlp.gate.weight" not in name}
    if sizes["tie_word_embeddings"] or theirs.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    made = make("illada", **{"head_dim": 8, "tie_word_embeddings": False, **ours})
    made.load_state_dict(tensors)
    tokens = torch.randint(40, (2, 11), generator=seeded(0))
    logits = real(tokens, attention_mask=torch.zeros(2, 1, 11, 11)).logits
    torch.testing.assert_close(made(tokens).logits, logits, atol=2e-4, rtol=1e-4)
    is_real = torch.ones(2, 11, dtype=torch.bool)
    is_real[1, :4] = False
    hidden_from = torch.where(is_real, 0.0, torch.finfo(torch.float32).min)[:, None, None].expand(
        2, 1, 11, 11
    )
    logits = real(
        tokens, attention_mask=hidden_from, position_ids=torch.arange(11).expand(2, 11)
    ).logits
    torch.testing.assert_close(
        made(tokens, attention_mask=is_real).logits[is_real], logits[is_real], atol=2e-4, rtol=1e-4
    )


def test_what_has_no_meaning_is_refused(model):
    tokens = expected("input_ids")
    embeds = torch.zeros(1, 4, 64)
    for arguments, sentence in [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": tokens, "inputs_embeds": embeds},
            "exactly one of input_ids and inputs_embeds",
        ),
        ({"inputs_embeds": embeds, "labels": tokens}, "labels need input_ids"),
        (
            {"input_ids": tokens, "use_cache": True},
            "past_key_values and use_cache=True do not exist",
        ),
        (
            {"input_ids": tokens, "past_key_values": ()},
            "past_key_values and use_cache=True do not exist",
        ),
        (
            {"input_ids": tokens, "output_attentions": True},
            "output_attentions=True is not supported",
        ),
        (
            {"input_ids": tokens, "attention_mask": torch.ones(3, 1, 48, 48)},
            r"shape \(3, 1, 48, 48\)",
        ),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model(**arguments)
    with pytest.raises(NotImplementedError, match=r"model\.generate_diffusion\(input_ids"):
        model.generate(tokens, max_new_tokens=3)
    assert not model.can_generate()


# ---- the loss


def published_loss(model):
    noisy, p_B1 = expected("pretrain_noisy"), expected("pretrain_p_mask")[:, None]
    logits = model(noisy).logits
    tokens = expected("pretrain_tokens").long()
    return shared(model).masked_diffusion_loss(logits, tokens, noisy == MASK, p_B1, tokens.numel())


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_pretraining_loss_equals_the_published_one(model):
    torch.testing.assert_close(
        published_loss(model), expected("pretrain_loss"), rtol=1e-5, atol=0, check_dtype=False
    )


def test_sft_loss_equals_the_published_one(model):
    noisy, tokens = expected("sft_noisy"), expected("sft_tokens").long()
    is_masked_BT = noisy == MASK
    logits = model(noisy).logits
    loss = 0
    for row, length in enumerate(tokens.shape[1] - expected("sft_prompt_lengths")):
        p_B1 = expected("sft_p_mask").reshape(len(tokens), -1)[row : row + 1, :1]
        of_row = slice(row, row + 1)
        loss += shared(model).masked_diffusion_loss(
            logits[of_row], tokens[of_row], is_masked_BT[of_row], p_B1, length
        )
    torch.testing.assert_close(
        loss / len(tokens), expected("sft_loss"), rtol=1e-5, atol=0, check_dtype=False
    )


def test_gradient_norm_of_every_tensor_equals_the_published_one(model):
    grads = gradients(model, published_loss(model))
    assert grads.keys() == FACTS["pretrain_grad_norms"].keys()
    for name, norm in FACTS["pretrain_grad_norms"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4), name


def test_rows_are_masked_with_a_probability_uniform_above_its_floor(model):
    tokens = torch.zeros(20_000, 50, dtype=torch.int64)
    is_maskable = torch.arange(50) >= 10
    noisy, is_masked, p = shared(model).corrupt(
        tokens, is_maskable.expand_as(tokens), mask_id=MASK, generator=seeded(0)
    )
    assert torch.equal(noisy, torch.where(is_masked, MASK, tokens))
    assert not is_masked[:, :10].any()
    ranks = torch.linspace(1e-3, 1, 20_000)
    # Kolmogorov-Smirnov, about 1e-3
    assert (p[:, 0].sort().values - ranks).abs().max() < 2 / math.sqrt(20_000)
    assert 1e-3 <= p.min() < 2e-3
    surplus = is_masked[:, 10:].float() - p
    for low in torch.arange(0, 1, 0.1):  # and given p, every token alone
        some = surplus[((p >= low) & (p < low + 0.1))[:, 0]]
        assert abs(some.mean().item()) < 4.5 * 0.5 / math.sqrt(some.numel())
        pairs = some[:, 0::2] * some[:, 1::2]
        assert abs(pairs.mean().item()) < 4.5 * 0.25 / math.sqrt(pairs.numel())


def exact_loss(model, tokens: torch.Tensor, is_maskable: torch.Tensor) -> float:
    """The expectation of the loss of one row by its definition: over all sets of masks, and t by
    quadrature.

    E = 1/L sum over sets of k masked tokens of (integral over t of p^(k - 1) (1 - p)^(L - k)) times
    their summed nll.
    """
    places = is_maskable.nonzero()[:, 0].tolist()
    L = len(places)
    nodes, weights = np.polynomial.legendre.leggauss(40)  # exact for these polynomials
    p = (1 - 1e-3) * (nodes + 1) / 2 + 1e-3
    total = 0.0
    for k in range(1, L + 1):
        integral = (weights / 2 * p ** (k - 1) * (1 - p) ** (L - k)).sum()
        for masked in itertools.combinations(places, k):
            noisy = tokens.clone()
            noisy[list(masked)] = 39
            log_p = model(noisy[None]).logits[0].double().log_softmax(-1)
            total -= integral * sum(log_p[i, tokens[i]].item() for i in masked)
    return total / L


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llada", "illada, full QK-norm, biases, shift"])
def test_the_mean_of_the_loss_is_the_bound_that_its_definition_gives(make, variant):
    made = make(variant)
    # a prompt of two tokens, one of them the mask itself
    tokens = torch.tensor([3, 39, 8, 20, 5, 11])
    is_maskable = torch.tensor([False, False, True, True, True, True])
    labels = tokens.where(is_maskable, -100)
    draws = torch.tensor(
        [
            made(
                tokens.expand(500, 6), labels=labels.expand(500, 6), generator=seeded(seed)
            ).loss.item()
            for seed in range(60)
        ]
    )
    standard_error = draws.std().item() / math.sqrt(60)
    exact = exact_loss(made, tokens, is_maskable)
    assert standard_error < 0.02 * exact
    assert draws.mean().item() == pytest.approx(exact, abs=4 * standard_error)


@torch.no_grad()
def test_the_loss_counts_maskable_tokens_and_only_real_ones(make):
    made = make("llada")
    tokens = torch.randint(38, (4, 16), generator=seeded(0))
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :10] = attention_mask[1, 9:] = 0
    by_mask = made(tokens, attention_mask=attention_mask, labels=tokens, generator=seeded(1))
    labels = tokens.where(attention_mask.bool(), -100)
    by_labels = made(tokens, attention_mask=attention_mask, labels=labels, generator=seeded(1))
    assert torch.equal(by_mask.loss, by_labels.loss)
    assert torch.equal(by_mask.logits, by_labels.logits)
    count = (labels != -100).sum()
    doubled = made(
        tokens,
        attention_mask=attention_mask,
        labels=labels,
        generator=seeded(1),
        num_items_in_batch=2 * count,
    )
    torch.testing.assert_close(doubled.loss, by_mask.loss / 2)
    nothing = made(tokens, labels=torch.full_like(tokens, -100))
    assert nothing.loss.item() == 0
    assert torch.equal(nothing.logits, made(tokens).logits)  # and nothing was masked


@torch.no_grad()
def test_a_seed_decides_the_corruption(make):
    made = make("illada")
    tokens = torch.randint(38, (4, 16), generator=seeded(0))
    first, again, other = (
        made(tokens, labels=tokens, generator=seeded(seed)).loss for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(made(tokens, labels=tokens).loss)
    assert torch.equal(*losses)
    assert torch.equal(
        made(tokens, labels=tokens, generator=seeded(1), return_dict=False)[0], first
    )


def test_an_untrained_uniform_model_scores_log_v_for_every_seed_on_average(make):
    """At the weights 0 of the head every nll is log V: what is left is the mean of 1/p, which must
    be 1.
    """
    made = make("llada")
    with torch.no_grad():
        made.get_output_embeddings().weight.zero_()
        tokens = torch.randint(38, (256, 64), generator=seeded(0))
        draws = torch.tensor(
            [made(tokens, labels=tokens, generator=seeded(seed)).loss.item() for seed in range(20)]
        )
    assert draws.mean().item() == pytest.approx(
        math.log(40), abs=4 * draws.std().item() / math.sqrt(20)
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make, variant, padded):
    made = make(variant).train()
    tokens = torch.randint(38, (3, 12), generator=seeded(0))
    attention_mask = torch.ones_like(tokens)
    attention_mask[0, :4] = 1 - padded
    calls = []
    layers = made.transformer_parts()[1]
    layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def compute():
        return made(tokens, attention_mask=attention_mask, labels=tokens, generator=seeded(5)).loss

    plain = gradients(made, compute())
    assert len(calls) == 1
    made.gradient_checkpointing_enable()
    saved = gradients(made, compute())
    assert len(calls) == 3  # once forward, once more in the backward pass
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, msg=name)
        assert gradient.abs().max() > 0, name
    made.gradient_checkpointing_disable()
    compute()
    assert len(calls) == 4


def test_a_few_steps_of_training_lower_the_loss(make):
    made = make("illada, tied, QK-norm per head").train()
    tokens = (torch.arange(16)[None] + torch.arange(8)[:, None]) % 30
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        loss = made(tokens, labels=tokens, generator=seeded(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])


def test_the_trainer_of_transformers_may_hand_in_its_count(model):
    assert model.accepts_loss_kwargs
    assert "num_items_in_batch" in inspect.signature(model.forward).parameters


# ---- the sampler


@pytest.mark.parametrize("name", FACTS["generate"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 3)])
def test_published_samples_are_reproduced_exactly(model, name, left, right):
    prompt = expected("gen_prompt").long()
    padded = F.pad(prompt, (left, right), value=EOS)
    attention_mask = F.pad(torch.ones_like(prompt), (left, right))
    canvas = model.generate_diffusion(padded, attention_mask, **FACTS["generate"][name])
    assert torch.equal(canvas[:, : padded.shape[1]], padded)
    assert torch.equal(
        canvas[:, padded.shape[1] :], expected(f"gen_{name}")[:, prompt.shape[1] :].long()
    )


def scripted(model, script):
    """Lets `script` change the logits (in place, [B, T, V]) of every forward pass; returns the list
    of canvases seen.
    """
    seen = []

    def before(module, arguments, keywords):
        seen.append(arguments[0].clone())

    def after(module, arguments, output):
        script(output.logits)
        return output

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    return seen


def test_the_mask_is_never_chosen(make):
    made = make("llada")

    def like_masks(logits):
        logits[..., 39] += 100

    scripted(made, like_masks)
    for remasking, temperature in itertools.product(("low_confidence", "random"), (0.0, 1.0)):
        canvas = made.generate_diffusion(
            torch.tensor([[1, 39]]),
            gen_length=8,
            steps=3,
            remasking=remasking,
            temperature=temperature,
        )
        assert canvas[0, :2].tolist() == [1, 39]
        assert (canvas[0, 2:] != 39).all()


def test_every_step_reveals_its_share_in_its_block_and_revises_nothing(make):
    made = make("llada")
    seen = scripted(made, lambda logits: None)
    canvas = made.generate_diffusion(
        torch.tensor([[1, 2]]), gen_length=10, block_length=5, steps=6, remasking="random"
    )
    states = [*seen, canvas]
    hidden = [(state == 39)[0].sum().item() for state in states]
    assert hidden == [10, 8, 6, 5, 3, 1, 0]  # five tokens in three steps: 2, 2, 1, as published
    for before, after in itertools.pairwise(states):
        assert torch.equal(before[before != 39], after[before != 39])
    assert (seen[3][0, 2:7] != 39).all()
    assert (seen[3][0, 7:] == 39).all()


def test_eos_ends_a_row_after_its_block_and_all_rows_the_loop(make):
    made = make("llada")

    # at the second token of the second block of the first row, and everywhere in the second
    def say_eos(
        logits,
    ):
        logits[0, :, 38] -= 100
        logits[0, 2 + 5, 38] += 200
        logits[1, :, 38] += 100

    seen = scripted(made, say_eos)
    prompts = torch.tensor([[1, 38], [3, 4]])  # an EOS in a prompt ends nothing
    canvas = made.generate_diffusion(prompts, gen_length=16, block_length=4, stop_at_eos=True)
    assert len(seen) == 8
    assert (canvas[0, 7:] == 38).all()
    assert (canvas[0, 2:7] != 38).all()
    assert (canvas[1, 2:] == 38).all()
    full = made.generate_diffusion(prompts, gen_length=16, block_length=4)
    assert len(seen) == 8 + 16
    assert full[0, 8:].ne(38).all()


def test_a_temperature_draws_from_the_tempered_distribution(make):
    made = make("illada")
    prompts = torch.tensor([[1, 2, 3]]).expand(20_000, 3)
    logits = made(torch.tensor([[1, 2, 3, 39]])).logits[0, -1].detach().double()
    logits[39] = -torch.inf
    for temperature in (0.5, 1.0):
        canvas = made.generate_diffusion(
            prompts, gen_length=1, temperature=temperature, generator=seeded(0), remasking="random"
        )
        probability = (logits / temperature).softmax(-1)
        count = torch.bincount(canvas[:, -1], minlength=40)
        error = (count - 20_000 * probability) / (
            20_000 * probability * (1 - probability)
        ).sqrt().clamp(min=1)
        assert error.abs().max() < 4.5


def test_a_seed_decides_the_sample_and_random_order_is_uniform(make):
    made = make("llada")
    prompt = torch.tensor([[1, 2]])
    arguments = {"gen_length": 8, "temperature": 1.0, "remasking": "random"}
    first, again, other = (
        made.generate_diffusion(prompt, generator=seeded(s), **arguments) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    seen = scripted(made, lambda logits: None)
    made.generate_diffusion(
        prompt.expand(4000, 2), gen_length=4, remasking="random", generator=seeded(0)
    )
    revealed_first = (seen[1][:, 2:] != 39).float()
    assert (revealed_first.sum(1) == 1).all()
    assert (revealed_first.mean(0) - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"gen_length": 0}, "must be at least 1"),
        ({"gen_length": 16, "block_length": 7}, "block_length=7 must divide gen_length=16"),
        (
            {"gen_length": 16, "block_length": 4, "steps": 6},
            "steps=6 must be a multiple of the number of blocks",
        ),
        ({"gen_length": 16, "steps": 17}, "at most gen_length=16"),
        ({"gen_length": 16, "block_length": 0}, "block_length=0 .* must be at least 1"),
        (
            {"gen_length": 16, "remasking": "low-confidence"},
            "remasking='low-confidence' is unknown",
        ),
        (
            {"gen_length": 16, "temperature": -1.0},
            "temperature=-1.0 .* must be finite and not negative",
        ),
        (
            {"gen_length": 16, "cfg_scale": math.nan},
            "cfg_scale=nan must be finite and not negative",
        ),
    ],
)
def test_impossible_requests_to_the_sampler_are_refused(model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.generate_diffusion(torch.tensor([[1, 2]]), **arguments)
