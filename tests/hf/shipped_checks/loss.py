"""The loss of the files is the published one, and the bound that its definition gives."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from exported import FACTS, MASK, VARIANTS, expected, seeded, shared


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
