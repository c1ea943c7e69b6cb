"""Every knob of config.objective reaches the loss, and changes it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import default_config
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.masked_diffusion import masked_diffusion_loss
from llada_jax.objectives.named import make_objective
from llada_jax.objectives.sft import sft_loss
from llada_jax.objectives.vrpo import vrpo_loss
from llada_jax.rng import key_for

B, T = 8, 16
NATS = jnp.arange(10, dtype=jnp.float32) + 1
REFERENCE = NATS**0.5


class Ids:
    mask_id, bos_id, vocab_size = 9, 0, 10


def table_model(params, noisy_BT, targets_BT, where_BT, *rest):
    """Takes params[token] nats, and more where more is masked."""
    share_B1 = (noisy_BT == Ids.mask_id).mean(axis=1, keepdims=True)
    return TokenScores(jnp.where(where_BT, params[targets_BT] * (1 + share_B1), 0.0), where_BT)


def batch():
    """Rows of two documents, each a prompt of 2 tokens and an answer of 6 or of 4."""
    tokens = np.random.default_rng(0).integers(0, 9, (B, T)).astype(np.int32)
    row = {
        "segment_ids": [1] * 8 + [2] * 6 + [0] * 2,
        "positions": [*range(8), *range(6), 0, 0],
        "is_maskable": [False] * 2 + [True] * 6 + [False] * 2 + [True] * 4 + [False] * 2,
        "is_chosen": [True] * 8 + [False] * 8,
    }
    return {"tokens": tokens, **{name: np.tile(values, (B, 1)) for name, values in row.items()}}


@functools.cache
def loss_of(name, loss, **knobs):
    """Returns sum and count of a loss, or of the objective of a config where loss is None."""
    if loss is None:
        config = default_config().objective
        config.update({"name": name, **knobs})
        loss = make_objective(Ids, **config).loss
    else:
        loss = functools.partial(loss, mask_id=Ids.mask_id, **knobs)
    given = (table_model, NATS, batch(), key_for("test", 0), jnp.arange(B))
    return tuple(map(float, loss(*given, num_rows=B, step=0, frozen=REFERENCE)[:2]))


LOSSES = {
    "masked_diffusion": masked_diffusion_loss,
    "sft": sft_loss,
    "vrpo": functools.partial(
        vrpo_loss,
        num_times=8,
        masks_per_time=1,
        eps=1e-3,
        t_sampling="stratified",
        masking="bernoulli",
    ),
}
# What each objective is given in addition to its defaults.
CHANGES = {
    "masked_diffusion": [
        {"eps": 0.3},
        {"t_sampling": "mirrored"},
        {"t_sampling": "bell", "bell_width": 0.4},
        {"masking": "exact_count"},
        {"weight": "none"},
        {"weight": "none", "complementary": True},
    ],
    "sft": [
        {"eps": 0.3},
        {"t_sampling": "mirrored"},
        {"weight": "none"},
        {"masked": "documents"},
        {"mean_over": "tokens"},
        {"max_mask_ratio": 0.7},
        {"prompt_dropout": 0.5},
        {"weight": "none", "complementary": True},
    ],
    "vrpo": [
        {"eps": 0.3},
        {"t_sampling": "iid"},
        {"masking": "exact_count"},
        {"beta": 0.7},
        {"num_times": 3},
        {"masks_per_time": 2},
        {"shared_draws": False},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, each in CHANGES.items() for changes in each],
    ids=str,
)
def test_a_knob_reaches_the_loss_and_changes_it(name, changes):
    found = loss_of(name, None, **changes)
    assert found == pytest.approx(loss_of(name, LOSSES[name], **changes), rel=1e-6)
    for knob in changes:
        others = {other: value for other, value in changes.items() if other != knob}
        assert found != pytest.approx(loss_of(name, None, **others), rel=1e-4), knob
