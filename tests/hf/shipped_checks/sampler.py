"""The sampler of the files reproduces the published samples, and keeps its own rules."""

import itertools
import math

import pytest
import torch
from exported import EOS, FACTS, expected, seeded
from torch.nn import functional as F


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
    """Lets `script` change the logits (in place, [B, T, V] of the whole canvas, of which only the
    current block is read) of every forward pass; returns the list of canvases seen.
    """
    seen = []

    def before(module, arguments, keywords):
        seen.append(arguments[0].clone())

    def after(module, arguments, keywords, output):
        B, T = arguments[0].shape
        whole = torch.zeros(B, T, output.logits.shape[-1])
        whole[:, keywords["columns"]] = output.logits
        script(whole)
        output.logits = whole[:, keywords["columns"]]
        return output

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
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


@pytest.mark.parametrize(
    ("layout", "key"), [("llada", "vocab_size"), ("illada", "unpadded_vocab_size")]
)
def test_a_row_of_the_embedding_without_a_token_is_never_chosen(make, layout, key):
    made = make(layout, **{key: 30}, mask_token_id=29, eos_token_id=28, pad_token_id=28)

    def like_padding(logits):
        logits[..., 30:] += 100

    scripted(made, like_padding)
    for temperature in (0.0, 1.0):
        canvas = made.generate_diffusion(
            torch.tensor([[1, 2]]), gen_length=8, steps=3, temperature=temperature
        )
        assert (canvas[0, 2:] < 29).all()


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
        ({"temperature": -1.0}, "temperature=-1.0 .* must be numbers from 0 to 1e6"),
        ({"temperature": 1e39}, "temperature=1e[+]39 .* must be numbers from 0 to 1e6"),
        ({"cfg_scale": math.nan}, "cfg_scale=nan must be numbers from 0 to 1e6"),
        ({"commit": "confidence"}, "commit='confidence' is unknown; use one of schedule, thresh"),
        ({"commit": "schedule=3"}, "commit='schedule=3' is unknown"),
        ({"commit": "threshold=high"}, "amount of threshold must be a number between 0 and 1;"),
        ({"commit": "frechet=1.5"}, "between 0 and 1; the usual one is frechet=0.25"),
        ({"revise": "wina"}, "revise='wina' is unknown; use one of none, remdm-cap, remdm-rescale"),
        ({"revise": "none=1"}, "revise='none=1' is unknown"),
        ({"revise": "wino=2"}, "the amount of wino is the probability below which a masked token"),
        ({"revise": "remdm-loop", "commit": "factor"}, "commit=factor goes ahead of it"),
        ({"revise": "wino", "cache": "dual"}, "leave cache=dual out"),
        ({"top_k": -1, "temperature": 1.0}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0 must be greater than 0"),
        ({"top_k": 5}, "temperature=0 draws nothing"),
        ({"commit": "factor", "remasking": "margin"}, "remasking=margin names another order"),
        ({"eos": "first"}, "eos='first' is unknown; use one of free, never, last"),
        ({"cache": "suffix"}, "cache='suffix' is unknown; use one of none, prefix, dual"),
        ({"refresh": 2}, "refresh=2 with cache=none must not be negative and needs cache='prefix'"),
        ({"refresh": -1, "cache": "dual"}, "refresh=-1 with cache=dual must not be negative"),
    ],
)
def test_impossible_requests_to_the_sampler_are_refused(model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.generate_diffusion(torch.tensor([[1, 2]]), **arguments)


@pytest.mark.parametrize("arguments", [{"eos": "never"}, {"eos": "last"}, {"stop_at_eos": True}])
def test_what_ends_a_text_must_be_known_where_it_is_asked_for(make, arguments):
    model = make("llada", eos_token_id=None)
    prompt = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="config.eos_token_id is None; set it"):
        model.generate_diffusion(prompt, gen_length=4, **arguments)
    assert model.generate_diffusion(prompt, gen_length=4).shape == (1, 6)
