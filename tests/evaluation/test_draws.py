"""Which numbers a bound is made of: a draw of its own for each batch and repetition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.evaluation import likelihood
from llada_jax.objectives.objective import Objective


def key_as_nats(nll_fn, params, batch, key, row_B, **more):
    count = batch["tokens"].sum().astype(jnp.float32)
    pair = (count * jax.random.uniform(key), count)
    return *pair, {"loss": pair, "nelbo": pair}


def test_batches_and_draws_have_noise_of_their_own_and_are_weighed_by_their_tokens():
    objective = Objective(key_as_nats, key_as_nats, "nelbo")
    batches = [{"tokens": jnp.full((1, 1), number)} for number in (1, 10, 100)]
    pairs = []
    bound = likelihood.bound(objective, None, {}, batches, num_rows=1, num_draws=4, scored=pairs)
    nats, tokens = np.array(pairs).T
    assert tokens.tolist() == [1] * 4 + [10] * 4 + [100] * 4
    assert len(set((nats / tokens).round(6))) == 12
    assert bound.nats_per_token == pytest.approx(nats.sum() / tokens.sum())
    assert bound.num_tokens == 111
    # one batch and a half: the second is scored again, and the first is not
    first = [(-1.0, 1.0)] * 4
    continued = [*first, *pairs[4:6]]
    likelihood.bound(objective, None, {}, batches, num_rows=1, num_draws=4, scored=continued)
    assert continued == [*first, *pairs[4:]]
