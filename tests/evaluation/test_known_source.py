"""The source of configs/known_source.py: its entropy, its rows, and that the true conditionals of
the source score its entropy.
"""

import functools
import itertools
import json
import math
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import CONFIGS

from llada_jax.evaluation import likelihood
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion

SOURCE = runpy.run_path(str(CONFIGS / "known_source" / "make_rows.py"))

S, HALF = 4, 4  # of the small source; a row has 2 * HALF tokens
EOS, MASK, BOS = S, S + 1, S + 2
TABLE = SOURCE["transitions"](S)


@functools.cache
def every_chain() -> tuple[np.ndarray, np.ndarray]:
    """Returns all chains of HALF symbols, int [S**HALF, HALF], and their probabilities."""
    chains = list(itertools.product(range(S), repeat=HALF))
    probabilities = [
        math.prod([1 / S**2, *(TABLE[chain[i - 2 : i + 1]] for i in range(2, HALF))])
        for chain in chains
    ]
    return np.array(chains), np.array(probabilities)


def entropy_by_enumeration() -> float:
    _, probability = every_chain()
    return float(-np.sum(probability * np.log(np.where(probability > 0, probability, 1))))


def with_copies(chains: np.ndarray) -> np.ndarray:
    eos = np.full((len(chains), 1), EOS)
    return np.concatenate([chains, chains[:, :-1], eos], axis=1).astype(np.int32)


def batch_of(chains: np.ndarray) -> dict:
    tokens = with_copies(chains)
    positions = np.broadcast_to(np.arange(2 * HALF, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    return {
        "tokens": tokens,
        "segment_ids": ones,
        "positions": positions,
        "is_maskable": ones > 0,
    }


def true_conditionals(is_seen_BTT, tokens_BT, where_BT):
    """Scores every token by its probability given those that is_seen_BTT[b, i] marks, by adding up
    the probabilities of all rows that agree with them.
    """
    chains, probability = every_chain()
    rows_RT = jnp.asarray(with_copies(chains))
    agrees_BRT = rows_RT[None] == tokens_BT[:, None]
    # [b, r, i]: how many of the tokens that position i sees are others in row r
    others_BRT = jnp.einsum("bru,biu->bri", 1.0 - agrees_BRT, 1.0 * is_seen_BTT)
    weight_BRT = (others_BRT == 0) * jnp.asarray(probability, jnp.float32)[None, :, None]
    nll_BT = -jnp.log((weight_BRT * agrees_BRT).sum(axis=1) / weight_BRT.sum(axis=1))
    return TokenScores(jnp.where(where_BT, nll_BT, 0.0), where_BT)


def bidirectional(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    is_seen_BTT = jnp.broadcast_to((noisy_BT != MASK)[:, None], (*noisy_BT.shape, 2 * HALF))
    return true_conditionals(is_seen_BTT, targets_BT, where_BT)


def causal(params, shifted_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    before_TT = jnp.tril(jnp.ones((2 * HALF, 2 * HALF), bool), -1)
    return true_conditionals(
        jnp.broadcast_to(before_TT, (len(targets_BT), *before_TT.shape)), targets_BT, where_BT
    )


def test_the_entropy_over_states_is_that_of_all_rows():
    _, probability = every_chain()
    assert probability.sum() == pytest.approx(1, abs=1e-12)
    assert SOURCE["entropy"](TABLE, HALF) == pytest.approx(entropy_by_enumeration(), rel=1e-12)


def test_rows_are_drawn_with_the_probabilities_of_the_chain():
    chains, probability = every_chain()
    num_rows = 100_000
    drawn = SOURCE["chains"](TABLE, num_rows, HALF, np.random.default_rng(2))
    places = S ** np.arange(HALF)[::-1]
    counts = np.bincount(drawn @ places, minlength=S**HALF)
    expected = num_rows * probability[np.argsort(chains @ places)]
    frequent = expected > 20
    chi2 = np.sum((counts - expected)[frequent] ** 2 / expected[frequent])
    degrees = frequent.sum()
    assert degrees > 50
    assert abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees)
    rare = counts[~frequent].sum(), expected[~frequent].sum()
    assert abs(rare[0] - rare[1]) < 4 * math.sqrt(rare[1])


def test_a_line_is_a_chain_and_its_copy(tmp_path):
    SOURCE["main"](str(tmp_path), num_rows=50)
    lines = (tmp_path / "rows.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50
    half = SOURCE["HALF"]
    for line in lines:
        assert len(line) == 2 * half - 1
        assert line[half:] == line[: half - 1]
        assert set(line) <= set(SOURCE["ALPHABET"])
    entropy = json.loads((tmp_path / "entropy.json").read_text())
    # much to learn, of 32 log 32 nats for symbols that are drawn alike, and something left
    assert 0.6 < entropy["nats_per_row"] / (half * math.log(32)) < 0.8
    assert entropy["nats_per_token"] == entropy["nats_per_row"] / (2 * half)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked_diffusion", "autoregressive"])
def test_the_true_conditionals_score_the_entropy_within_the_standard_error(name):
    rng = np.random.default_rng(3)
    batches = [batch_of(SOURCE["chains"](TABLE, 256, HALF, rng)) for _ in range(40)]
    objective, nll_fn = {
        "masked_diffusion": (masked_diffusion(mask_id=MASK), bidirectional),
        "autoregressive": (autoregressive(bos_id=BOS), causal),
    }[name]
    bound = likelihood.bound(objective, nll_fn, {}, batches, num_rows=256)
    entropy = entropy_by_enumeration() / (2 * HALF)
    assert bound.standard_error < 0.01 * entropy
    assert abs(bound.nats_per_token - entropy) < 3 * bound.standard_error
