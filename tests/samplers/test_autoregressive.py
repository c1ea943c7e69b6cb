"""Next-token sampling of a causal network, against passes over the whole row."""

import jax
import numpy as np
import pytest
from support.recital import BYTES

from llada_jax.errors import UserError
from llada_jax.masks import CAUSAL
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.text import continue_text

V, MASK, PAD, BOS = 260, 256, 259, 258
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], []]
REQUEST = {"mask_id": MASK, "pad_id": PAD, "bos_id": BOS, "gen_length": 10}


@pytest.fixture(scope="module")
def network():
    shape = dict(vocab_size=V, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8)
    model = make_model(Architecture(**shape, d_ff=64), mask=CAUSAL)
    return model, model.init(jax.random.key(3))


def logits_after(network, text):
    """The logits of the token behind `text`, from a row that is shifted as in training. Padded to
    one length, because the network is causal, so that it is compiled once.
    """
    model, params = network
    row = np.full((1, 24), PAD, np.int32)
    row[0, : len(text) + 1] = [BOS, *text]
    positions = np.arange(24)[None]
    logits_fn = jax.jit(model.logits_fn)
    return np.array(logits_fn(params, row, np.ones_like(row), positions))[0, len(text)]


def greedy(network, prompt, length):
    text = list(prompt)
    for _ in range(length):
        logits_V = logits_after(network, text)
        logits_V[MASK] = -np.inf
        text.append(int(logits_V.argmax()))
    return text[len(prompt) :]


def sample(network, prompts=PROMPTS, **changes):
    model, params = network
    return continue_tokens(model.cached_fn, params, prompts, **(REQUEST | changes))


@pytest.mark.slow
def test_greedy_texts_are_those_of_passes_over_the_whole_row(network):
    tokens_BT, num_steps_B = sample(network)
    assert tokens_BT.tolist() == [greedy(network, prompt, 10) for prompt in PROMPTS]
    assert num_steps_B.tolist() == [10] * 3


@pytest.mark.slow
def test_a_row_ends_at_its_own_end_of_text(network):
    expected_BT, _ = sample(network)
    eos_id = int(expected_BT[0, 4])
    first_B = [row.index(eos_id) if eos_id in row else 9 for row in expected_BT.tolist()]
    tokens_BT, num_steps_B = sample(network, eos_id=eos_id)
    for row, first in enumerate(first_B):
        assert tokens_BT[row, : first + 1].tolist() == expected_BT[row, : first + 1].tolist()
        assert set(tokens_BT[row, first + 1 :].tolist()) <= {eos_id}
        assert num_steps_B[row] == first + 1
    unstopped_BT, _ = sample(network, eos_id=eos_id, stop_at_eos=False)
    np.testing.assert_array_equal(unstopped_BT, expected_BT)


@pytest.mark.slow
def test_a_row_draws_the_same_whatever_else_is_sampled_with_it(network):
    together_BT, _ = sample(network, temperature=1.0, seed=4)
    single_BT, _ = sample(network, temperature=1.0, seed=4, batch_size=1)
    other_BT, _ = sample(network, temperature=1.0, seed=5)
    last_BT, _ = sample(
        network, PROMPTS[:0:-1], noise_numbers=[2, 1], temperature=1.0, seed=4, batch_size=1
    )
    np.testing.assert_array_equal(together_BT, single_BT)
    np.testing.assert_array_equal(last_BT, single_BT[:0:-1])
    assert (together_BT != other_BT).any()


@pytest.mark.slow
def test_the_first_token_follows_the_softmax(network):
    tokens_BT, _ = sample(
        network, prompts=[[7]] * 600, gen_length=4, temperature=1.0, batch_size=600
    )
    logits_V = logits_after(network, [7]).astype(np.float64)
    logits_V[MASK] = -np.inf
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    # Ten classes of about equal probability, so that each expects 60 rows.
    order = np.argsort(-p_V)
    class_V = np.empty(V, int)
    class_V[order] = np.minimum((np.cumsum(p_V[order]) - p_V[order]) * 10, 9).astype(int)
    expected = np.bincount(class_V, weights=p_V, minlength=10) * 600
    observed = np.bincount(class_V[tokens_BT[:, 0]], minlength=10)
    assert ((observed - expected) ** 2 / expected).sum() < 45.0, (
        "9 degrees of freedom: a correct sampler exceeds this once in a million seeds"
    )


@pytest.mark.slow
def test_text_is_continued_and_settings_of_denoising_are_refused(network):
    model, params = network
    completions = continue_text(model.cached_fn, params, BYTES, ["it", ""], gen_length=6)
    assert completions[0].tokens == greedy(network, list(b"it"), 6)
    assert completions[0].num_steps == 6
    with pytest.raises(UserError, match="steps=3 is about denoising"):
        continue_text(model.cached_fn, params, BYTES, ["it"], gen_length=6, steps=3)
    with pytest.raises(UserError, match="suppress leave none of the 260 ids"):
        continue_text(model.cached_fn, params, BYTES, ["it"], gen_length=6, suppress=range(260))
    with pytest.raises(UserError, match="gen_length=0 must be at least 1"):
        continue_text(model.cached_fn, params, BYTES, ["it"], gen_length=0)
