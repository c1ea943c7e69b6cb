"""The network of the files computes what the published one and those of transformers compute."""

import copy

import pytest
import torch
import transformers
from exported import LLAMA3, SMALL, VARIANTS, expected, seeded, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F


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
    # next to it, a row of nothing but padding
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
