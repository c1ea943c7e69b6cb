"""The sampler of the files against that of the package, step by step, and its caches."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import VARIANTS, expected, seeded, shared
from torch.nn import functional as F
from transformers import AutoModel

IN_JAX = Path(os.environ["SAMPLES_IN_JAX"])
WANTED = json.loads((IN_JAX / "requests.json").read_text())
STEPS = np.load(IN_JAX / "steps.npz")


def left_padded(prompts):
    """Returns prompts of several lengths as input_ids and attention_mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    is_real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, is_real


def states_of(model, input_ids, attention_mask=None, **settings):
    """Returns the canvas after every pass of the network: [passes, rows, generated columns]."""
    B, P = input_ids.shape
    canvas = F.pad(input_ids, (0, settings["gen_length"]), value=model.config.mask_token_id)
    states = []

    def before(module, arguments, keywords):
        """What goes in is the canvas, or a part of it: a window, or no later blocks."""
        cache, tokens = keywords["cache"], arguments[0][:B]
        first = 0 if cache is None or cache[0].kept is None else cache[0].start
        if keywords["shadow"] is not None:
            tokens = tokens[:, : -len(keywords["shadow"])]
        canvas[:, first : first + tokens.shape[1]] = tokens
        states.append(canvas[:, P:].clone())

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    last = model.generate_diffusion(input_ids, attention_mask, **settings)
    hook.remove()
    return torch.stack([*states[1:], last[:, P:]])


@pytest.fixture(scope="module")
def sharp(directory):
    """The published fixture with logits 8 times as large, and ends of its own."""
    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 8
    model.config.eos_token_id, model.config.eot_token_id = WANTED["ends"]
    return model


@pytest.mark.parametrize("number", range(len(WANTED["requests"])))
def test_both_samplers_reveal_the_same_tokens_in_the_same_steps(sharp, number, monkeypatch):
    request, wanted = WANTED["requests"][number], STEPS[f"request {number}"]
    if "remdm" in request.get("revise", ""):  # the draws are those of the package
        draws = iter(torch.from_numpy(STEPS[f"draws {number}"]))
        rules = shared(sharp, "DiffusionSampler").taken_back_by_chance.__globals__
        monkeypatch.setitem(rules, "uniform", lambda like_BT, generator: next(draws))
    states = states_of(sharp, *left_padded(WANTED["prompts"]), **request)
    np.testing.assert_array_equal(states.numpy(), wanted)
    # or nothing but the schedule would have been compared
    if "commit" in request and request["commit"] != "schedule":
        assert 3 <= len(states) < request["gen_length"]
    mask_id = sharp.config.mask_token_id
    was_taken_back = ((states[:-1] != mask_id) & (states[1:] == mask_id)).any()
    assert was_taken_back == ("revise" in request)


def test_the_likely_tokens_are_those_of_the_package(sharp):
    keep_likely = shared(sharp, "DiffusionSampler").pick_tokens.__globals__["keep_likely"]
    for number, (top_k, top_p) in enumerate(WANTED["likely"]):
        kept = keep_likely(torch.from_numpy(STEPS["logits"]), top_k, top_p)
        np.testing.assert_array_equal(kept.numpy() > -np.inf, STEPS[f"likely {number}"])


def test_draws_are_restricted_to_the_likely_tokens(sharp):
    prompts = torch.tensor([[7, 301, 12]]).expand(400, 3)
    request = {"gen_length": 1, "temperature": 3.0, "generator": seeded(0)}
    logits = sharp(F.pad(prompts[:1], (0, 1), value=sharp.config.mask_token_id)).logits[0, -1]
    logits[sharp.config.mask_token_id] = -torch.inf
    likely = set(logits.topk(5).indices.tolist())
    assert set(sharp.generate_diffusion(prompts, top_k=5, **request)[:, -1].tolist()) == likely
    order = (logits / 3).softmax(-1).sort(descending=True)
    nucleus = order.indices[: int((order.values.cumsum(0) < 0.2).sum()) + 1].tolist()
    drawn = set(sharp.generate_diffusion(prompts, top_p=0.2, **request)[:, -1].tolist())
    assert drawn <= set(nucleus)
    assert len(drawn) > 1
    free = set(sharp.generate_diffusion(prompts, **request)[:, -1].tolist())
    assert not free <= set(nucleus) | likely


def test_each_rule_reveals_at_least_one_token_per_row_and_step(sharp):
    for commit in ("threshold=1", "factor=0", "frechet=1", "entropy=0"):
        request = {"gen_length": 6, "commit": commit}
        states = states_of(sharp, torch.tensor([[1, 2], [3, 4]]), **request)
        hidden = (states == sharp.config.mask_token_id).sum(-1)
        assert (hidden[:, 0] == torch.arange(5, -1, -1)).all() or commit == "entropy=0"
        assert (hidden[:-1] - hidden[1:]).clamp(max=1).eq(hidden[:-1].clamp(max=1)).all()


@pytest.mark.parametrize("commit", ["threshold=0.6", "factor", "frechet", "entropy", "wino"])
def test_any_row_alone_is_the_same_row_in_a_batch(sharp, commit):
    prompts = expected("gen_prompt").long()[:, :5]
    prompts = torch.cat([prompts, prompts.flip(1)])
    request = {"gen_length": 16, "block_length": 8, "commit": commit, "stop_at_eos": True}
    if commit == "wino":
        request |= {"commit": "threshold=0.3", "revise": "wino"}
    together = sharp.generate_diffusion(prompts, **request)
    for row, prompt in zip(together, prompts):
        assert torch.equal(sharp.generate_diffusion(prompt[None], **request)[0], row)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "shift" not in name])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_is_exact_where_it_is_refreshed_and_changes_logits_where_not(make, variant, cache):
    made = make(variant)
    ids, is_real = left_padded([[1, 2, 3, 4], [5, 6]])
    request = {"gen_length": 12, "block_length": 4, "cfg_scale": 0.5}
    plain = states_of(made, ids, is_real, **request)
    exact = states_of(made, ids, is_real, **request, cache=cache, refresh=1)
    assert torch.equal(exact, plain)
    widths, logits = [], []
    hooks = [
        made.register_forward_pre_hook(lambda m, given: widths.append(given[0].shape[1])),
        made.register_forward_hook(lambda m, given, output: logits.append(output.logits)),
    ]
    for choice in ({}, {"cache": cache, "refresh": 3}):
        made.generate_diffusion(ids, is_real, **request, **choice)
    for hook in hooks:
        hook.remove()
    window = {"prefix": [16, 12, 12, 16, 16, 8, 8, 16, 16, 4, 4, 16], "dual": [16, 4, 4, 16] * 3}
    assert widths == [16] * 12 + window[cache]
    assert torch.equal(logits[0], logits[12])
    assert not torch.allclose(logits[1], logits[13], atol=1e-3)


def test_a_window_over_an_unchanged_canvas_has_the_logits_of_the_whole(make):
    made = make("illada, tied, QK-norm per head")
    tokens = torch.randint(38, (2, 12), generator=seeded(0))
    is_real = torch.ones(2, 12)
    is_real[0, :3] = 0
    positions = (is_real.long().cumsum(1) - 1).clamp(min=0)
    cache = [shared(made, "DiffusionSampler").KeysValues(5) for _ in range(2)]
    whole = made(tokens, is_real, positions, cache=cache).logits
    window = made(tokens[:, 5:9], is_real, positions[:, 5:9], cache=cache).logits
    torch.testing.assert_close(window, whole[:, 5:9], atol=1e-5, rtol=0)
    part = made(tokens, is_real, positions, columns=slice(2, 4)).logits
    torch.testing.assert_close(part, whole[:, 2:4], atol=1e-6, rtol=0)


def test_a_shifted_network_refuses_a_cache_and_reads_shifted_columns(make):
    made = make("illada, full QK-norm, biases, shift")
    with pytest.raises(ValueError, match="output_shift.*use cache='none'"):
        made.generate_diffusion(torch.tensor([[1, 2]]), gen_length=4, cache="prefix")
    with pytest.raises(ValueError, match="another rule than revise='wino'"):
        made.generate_diffusion(torch.tensor([[1, 2]]), gen_length=4, revise="wino")
    tokens = torch.randint(38, (2, 12), generator=seeded(0))
    part = made(tokens, columns=slice(4, 7)).logits
    torch.testing.assert_close(part, made(tokens).logits[:, 4:7], atol=1e-6, rtol=0)
