"""Commit rules: ours by name, own ones as module:function, and the errors of wrong ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import ROOT
from support.toy_networks import MASK, PAD, toy_logits, toy_params

from llada_jax.errors import UserError
from llada_jax.samplers.remasking import REMASKING, commit_rule, confidences, low_confidence
from llada_jax.samplers.text import generate_tokens

OWN_RULES = """
import jax.numpy as jnp

def from_the_right(logits_BTV, choices_BT, keys_B):
    return jnp.broadcast_to(jnp.arange(choices_BT.shape[1], dtype=jnp.float32), choices_BT.shape)

def same_as_ours(logits_BTV, choices_BT, keys_B):
    from llada_jax.samplers.remasking import low_confidence
    return low_confidence(logits_BTV, choices_BT, keys_B)

def undecided(logits_BTV, choices_BT, keys_B):
    is_even_T = jnp.arange(choices_BT.shape[1]) % 2 == 0
    return jnp.broadcast_to(jnp.where(is_even_T, -jnp.inf, jnp.nan), choices_BT.shape)

def per_row(logits_BTV, choices_BT, keys_B):
    return jnp.zeros(len(choices_BT))

def half(logits_BTV, choices_BT, keys_B):
    return jnp.zeros(choices_BT.shape, jnp.bfloat16)

def ranks(logits_BTV, choices_BT, keys_B):
    return choices_BT

def forgets(logits_BTV, choices_BT, keys_B):
    pass

def no_keys(logits_BTV, choices_BT):
    return jnp.zeros(choices_BT.shape)

def raises(logits_BTV, choices_BT, keys_B):
    return logits_BTV @ choices_BT

confidence = 1.0
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """A module of the user's, next to no package of ours."""
    (tmp_path / "own_commit_rules.py").write_text(OWN_RULES)
    monkeypatch.syspath_prepend(tmp_path)


def sample(remasking, **changes):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 8, "steps": 4, **changes}
    tokens_BT, _ = generate_tokens(
        toy_logits, toy_params(), [[1, 2], [3]], remasking=remasking, **request
    )
    return tokens_BT


def test_a_name_of_the_table_and_an_own_function_are_rules():
    assert commit_rule("low_confidence").function is low_confidence
    assert commit_rule("own_commit_rules:half").name == "own_commit_rules:half"
    assert commit_rule("random") == commit_rule("random"), "or each request would compile again"


def test_an_own_rule_that_does_what_ours_does_samples_the_same():
    np.testing.assert_array_equal(sample("own_commit_rules:same_as_ours"), sample("low_confidence"))


def test_an_own_rule_decides_which_tokens_are_kept():
    revealed = []

    def on_step(rows, state):
        columns = np.flatnonzero(np.asarray(state.is_new_BT)[0])
        revealed.append((columns - columns.max() + 7).tolist() if not revealed else columns[0])

    sample("own_commit_rules:from_the_right", on_step=on_step)
    assert revealed[0] == [6, 7], "the two columns furthest to the right"
    assert revealed[1:] == sorted(revealed[1:], reverse=True)


def test_the_example_of_the_docs_keeps_the_sharpest_distribution(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    rule = commit_rule("lowest_entropy:lowest_entropy")
    certain, split, open_ = [9.0, 0.0, 0.0, 0.0], [5.0, 4.9, -9.0, -9.0], [1.2, 1.0, 1.0, 1.0]
    logits_BTV = jnp.array([[open_, split, certain]])
    confidence_BT = confidences(rule, logits_BTV, logits_BTV.argmax(-1), None)
    assert np.argsort(-confidence_BT[0]).tolist() == [2, 1, 0]
    expected = -np.log(4)  # of the uniform distribution, up to the sign
    uniform = confidences(rule, jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int), None)
    np.testing.assert_allclose(uniform, [[expected]], rtol=1e-6)
    # suppressed tokens have no probability, and no part in the entropy
    suppressed_BTV = jnp.concatenate([logits_BTV, jnp.full((1, 3, 1), -jnp.inf)], axis=-1)
    same_BT = confidences(rule, suppressed_BTV, logits_BTV.argmax(-1), None)
    np.testing.assert_allclose(same_BT, confidence_BT, rtol=1e-6)
    assert MASK not in sample("lowest_entropy:lowest_entropy")


@pytest.mark.slow
def test_a_rule_that_is_undecided_still_reveals_every_token():
    assert MASK not in sample("own_commit_rules:undecided")
    assert MASK not in sample("own_commit_rules:undecided", block_length=4)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("per_row", "returned float32[2]; it must return float32[2, 8]"),
        ("half", "returned bfloat16[2, 8]; it must return float32[2, 8]"),
        ("ranks", "returned int32[2, 8]; it must return float32[2, 8]"),
        ("forgets", "returned NoneType; it must return float32[2, 8]"),
        ("no_keys", "its signature (logits_BTV, choices_BT) does not take"),
        ("raises", "fails in "),
        ("confidence", "has the type float; name a function"),
        ("undecidedd", "Did you mean 'undecided'?"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_refused_before_the_first_step(function, sentence):
    steps = []
    with pytest.raises(UserError) as error:
        sample(f"own_commit_rules:{function}", on_step=lambda *state: steps.append(state))
    assert sentence in str(error.value)
    assert f"own_commit_rules:{function}" in str(error.value)
    assert steps == []


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="there is no module 'own_comit_rules'"):
        commit_rule("own_comit_rules:half")


@pytest.mark.parametrize(
    ("name", "expected", "order"),
    [
        ("low_confidence", lambda p: p.max(), [0, 1, 2]),
        ("entropy", lambda p: (p * np.log(p)).sum(), [1, 0, 2]),
        ("margin", lambda p: np.subtract(*np.sort(p)[:-3:-1]), [0, 2, 1]),
    ],
)
def test_each_rule_measures_certainty_in_its_own_way(name, expected, order):
    """Against numpy in float64, for three positions that each rule sorts differently."""
    p_TV = np.array(
        [
            [0.6, 0.1, 0.1, 0.1, 0.1],  # one token, or any other
            [0.4999, 0.4998, 0.0001, 0.0001, 0.0001],  # one of two
            [0.45, 0.2, 0.2, 0.1499, 0.0001],
        ]
    )
    logits_BTV = jnp.asarray(np.log(p_TV)[None] + 3.0, jnp.float32)
    confidence_BT = confidences(commit_rule(name), logits_BTV, logits_BTV.argmax(-1), None)
    np.testing.assert_allclose(confidence_BT[0], [expected(p) for p in p_TV], rtol=1e-4, atol=1e-6)
    assert np.argsort(-confidence_BT[0]).tolist() == order


@pytest.mark.parametrize("name", REMASKING)
def test_our_rules_keep_the_contract(name):
    logits_BTV = jax.random.normal(jax.random.key(0), (2, 5, 7)).astype(jnp.float32)
    keys_B = jax.random.split(jax.random.key(1), 2)
    confidence_BT = REMASKING[name](logits_BTV, logits_BTV.argmax(-1), keys_B)
    assert (confidence_BT.shape, confidence_BT.dtype) == ((2, 5), jnp.float32)
    # an entropy, in nats, counts downwards; the others are probabilities
    least, most = (-math.log(7), 0) if name == "entropy" else (0, 1)
    assert (confidence_BT >= least - 1e-6).all()
    assert (confidence_BT <= most).all()
