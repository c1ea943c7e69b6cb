"""The table between our parameters and published tensors: both directions, and the real classes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.hf_directories import SMALL, our_config, random_params
from support.transformers_versions import VERSIONS, run_python

from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.errors import UserError
from llada_jax.hf.config_json import (
    architecture_from,
    cannot_hold,
    choose_layout,
    hf_config,
    layout_of,
)
from llada_jax.hf.convert import tensors
from llada_jax.hf.read import read_params
from llada_jax.masks import CAUSAL
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture, num_parameters

LLADA_8B = Architecture(
    vocab_size=126_464,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=12_288,
)


def on_one_device(a: Architecture) -> dict:
    return abstract_parameters(make_model(a), one_device_mesh())


def unconverted(layout: str, a: Architecture, files: dict) -> dict:
    """Our parameters of the tensors in `files`, put together without llada_jax.hf.read."""
    params = {"blocks": {}}
    for tensor in tensors(layout, a):
        array = tensor.from_hf(files[tensor.name])
        if tensor.layer is None:
            params[tensor.path] = array
        else:
            params["blocks"].setdefault(tensor.path.removeprefix("blocks/"), []).append(array)
    return {
        **params,
        "blocks": {name: np.stack(layers) for name, layers in params["blocks"].items()},
    }


# ---- the published layout


def test_the_8b_layout_has_the_published_names_and_shapes():
    found = {tensor.name: tensor.hf_shape for tensor in tensors("llada", LLADA_8B)}
    assert len(found) == 291
    assert (
        found["model.transformer.wte.weight"]
        == found["model.transformer.ff_out.weight"]
        == (126_464, 4096)
    )
    for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
        assert found[f"model.transformer.blocks.31.{name}.weight"] == (4096, 4096)
    for name in ("ff_proj", "up_proj"):
        assert found[f"model.transformer.blocks.0.{name}.weight"] == (12_288, 4096)
    assert found["model.transformer.blocks.0.ff_out.weight"] == (4096, 12_288)
    assert (
        found["model.transformer.blocks.7.ff_norm.weight"]
        == found["model.transformer.ln_f.weight"]
        == (4096,)
    )


def test_the_published_checkpoint_comes_back_bit_by_bit_and_key_by_key(published):
    config = json.loads((published / "config.json").read_text())
    a, files = architecture_from(config), load_file(published / "model.safetensors")
    params = jax.device_get(read_params(published, on_one_device(a)))
    back = {tensor.name: tensor.to_hf(tensor.of(params)) for tensor in tensors("llada", a)}
    assert back.keys() == files.keys()
    for name, tensor in files.items():
        assert back[name].dtype == tensor.dtype == np.float32
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    again = hf_config(
        a,
        "llada",
        mask_id=510,
        eos_id=500,
        bos_id=500,
        pad_id=500,
        max_sequence_length=128,
        dtype="float32",
        source=config,
    )
    assert {key: again[key] for key in config} == config
    written = hf_config(
        a,
        "llada",
        mask_id=510,
        eos_id=500,
        bos_id=500,
        pad_id=500,
        max_sequence_length=128,
        dtype="float32",
    )
    # a note of transformers to itself
    assert config.keys() - written.keys() == {"_attn_implementation_autoset"}
    assert {key: written[key] for key in config.keys() & written.keys()} == {
        key: value for key, value in config.items() if key in written
    }


# ---- any architecture


@st.composite
def architectures(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    return Architecture(
        vocab_size=draw(st.integers(3, 70)),
        num_layers=draw(st.integers(1, 3)),
        d_model=draw(st.sampled_from([8, 24])),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        head_dim=draw(st.sampled_from([2, 4, 6])),
        d_ff=draw(st.integers(1, 20)),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 12_345.5])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "per_head", "full"])),
        attention_bias=draw(st.sampled_from(["none", "qkv", "qkvo"])),
        output_shift=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from([(), (8.0, 1.0, 4.0, 8192.0), (2.5, 0.5, 1.25, 31.0)])),
    )


@settings(max_examples=40)
@given(architectures(), st.sampled_from(["auto", "illada"]))
def test_every_parameter_has_a_tensor_of_its_own(a, wanted):
    table = tensors(choose_layout(a, wanted), a)
    assert len({tensor.name for tensor in table}) == len(table)
    assert sum(np.prod(tensor.hf_shape) for tensor in table) == num_parameters(a)


@pytest.mark.slow
@settings(max_examples=40)
@given(architectures(), st.sampled_from(["auto", "illada"]))
def test_ours_to_hugging_face_and_back_is_exact(a, wanted):
    layout = choose_layout(a, wanted)
    params = random_params(a)
    table = tensors(layout, a)
    files = {tensor.name: tensor.to_hf(tensor.of(params)) for tensor in table}
    assert len(files) == len(table)
    assert all(files[tensor.name].shape == tensor.hf_shape for tensor in table)
    assert sum(array.size for array in files.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    jax.tree.map(np.testing.assert_array_equal, unconverted(layout, a, files), params)
    config = our_config(layout, a)
    assert layout_of(config) == layout
    assert architecture_from(json.loads(json.dumps(config))) == a


@settings(max_examples=40)
@given(architectures())
def test_the_published_layout_is_chosen_exactly_where_the_published_code_has_such_a_network(a):
    holds = a.head_dim * a.num_heads == a.d_model and a.qk_norm != "per_head"
    holds &= a.attention_bias == "none" and not a.output_shift and not a.rope_scaling
    assert choose_layout(a) == ("llada" if holds else "illada")
    assert (cannot_hold("llada", a) == "") == holds
    if not holds:
        with pytest.raises(UserError, match="'llada' cannot hold this model: .* leave it at auto"):
            choose_layout(a, "llada")


def test_an_unknown_layout_is_refused():
    with pytest.raises(UserError, match="Did you mean 'illada'"):
        choose_layout(SMALL, "ilada")


# ---- the real classes

SCALED = {  # wavelengths of 6 (kept), 22 (mixed), 75 and more tokens
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 12,
}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-gqa-tied-biased": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama-wide-heads": ("Llama", {"head_dim": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("Llama", {"num_key_value_heads": 2, "rope_scaling": SCALED}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3-tied-biased": (
        "Qwen3",
        {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16},
    ),
}

MAKE = """
import json, pathlib, torch, transformers
home, variants = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for number, (name, (family, changes)) in enumerate(variants.items()):
    torch.manual_seed(number)
    config = getattr(transformers, family + "Config")(
        **{"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
           "num_attention_heads": 4, "num_key_value_heads": 4, "rope_theta": 20000.0, **changes})
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from norms of 1 and biases of 0
            parameter.add_(0.05 * torch.randn_like(parameter))
        tokens = torch.randint(0, 120, (2, 17))
        logits = model(tokens).logits
    model.save_pretrained(home / name)
    torch.save((tokens, logits), home / name / "logits.pt")
    import numpy
    numpy.savez(home / name / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
"""

LOAD = """
import json, pathlib, torch, transformers
home, variants = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for name, (family, _) in variants.items():
    model, told = getattr(transformers, family + "ForCausalLM").from_pretrained(
        home / name / "back", output_loading_info=True, torch_dtype=torch.float32)
    wrong = [told[f"{how}_keys"] for how in ("missing", "unexpected", "mismatched")]
    assert not any(wrong), (name, told)
    tokens, logits = torch.load(home / name / "logits.pt")
    with torch.no_grad():
        print(name, float((model.eval()(tokens).logits - logits).abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_llama_and_qwen_classes_agree_with_what_is_read_and_load_what_is_written(
    version, tmp_path
):
    # Qwen3 is younger than 4.49
    known = {
        name: variant
        for name, variant in VARIANTS.items()
        if (version, variant[0]) != ("4.49.0", "Qwen3")
    }
    variants = json.dumps(known)
    run_python(version, MAKE, tmp_path, variants, home=tmp_path)
    for name, (family, _) in known.items():
        directory = tmp_path / name
        config = json.loads((directory / "config.json").read_text())
        a = architecture_from(config)
        assert a.rope_theta == 20_000.0
        assert a.rope_scaling == ((8.0, 0.25, 1.0, 12.0) if name == "llama-3.1" else ())
        params = read_params(directory, on_one_device(a))
        expected = np.load(directory / "logits.npz")
        tokens = jnp.asarray(expected["tokens"])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        logits = jax.jit(make_model(a, mask=CAUSAL).logits_fn)(params, tokens, None, positions)
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0, err_msg=name)
        (directory / "back").mkdir()
        params = jax.device_get(params)
        back = {
            t.name: np.ascontiguousarray(t.to_hf(t.of(params))) for t in tensors(family.lower(), a)
        }
        save_file(back, directory / "back" / "model.safetensors", metadata={"format": "pt"})
        (directory / "back" / "config.json").write_text(json.dumps(config))
    differences = dict(
        line.split()
        for line in run_python(version, LOAD, tmp_path, variants, home=tmp_path).splitlines()
    )
    assert differences.keys() == known.keys()
    assert set(differences.values()) == {"0.0"}
