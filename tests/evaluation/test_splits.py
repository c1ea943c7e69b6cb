"""The bound on a split, with a model whose surprise is the same everywhere, so that it is known."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from support.datasets import SEQUENCE_LENGTH, write_dataset

from llada_jax.cluster.sharding import batch_sharding, one_device_mesh
from llada_jax.evaluation.splits import bound_of_split
from llada_jax.models.transformer import TokenScores
from llada_jax.objectives.masked_diffusion import masked_diffusion

NATS = 1.25
OBJECTIVE = masked_diffusion(mask_id=256)


def constant_nll(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    return TokenScores(jnp.where(where_BT, NATS, 0.0), where_BT)


def bound_of(dataset, nll_fn=constant_nll, attend_across_documents=True, **settings):
    return bound_of_split(
        SimpleNamespace(nll_fn=nll_fn),
        {},
        str(dataset),
        split="heldout",
        objective=OBJECTIVE,
        bytes_per_token=2.0,
        batch_size=8,
        sequence_length=SEQUENCE_LENGTH,
        batch_sharding=batch_sharding(one_device_mesh()),
        attend_across_documents=attend_across_documents,
        **settings,
    )


def test_every_token_of_the_split_is_scored_once_however_often_its_row_is_corrupted(small_dataset):
    batches, compilations, pairs = [], [], []
    bound = bound_of(
        small_dataset,
        num_draws=3,
        scored=pairs,
        on_batch=lambda: batches.append(1),
        on_compiled=lambda: compilations.append(1),
    )
    assert bound.num_tokens == 4000
    assert len(batches) == math.ceil(4000 / SEQUENCE_LENGTH / 8)
    assert len(pairs) == 3 * len(batches)
    assert len(compilations) == 1
    assert bound.nats_per_token == pytest.approx(NATS, rel=1e-5)
    assert bound.standard_error == pytest.approx(0.0, abs=1e-5)
    assert bound.bits_per_byte == pytest.approx(NATS / math.log(2) / 2.0, rel=1e-5)
    assert bound.bits_per_byte_standard_error == pytest.approx(0.0, abs=1e-5)


def test_a_limited_number_of_batches_is_a_subset_that_the_seed_chooses(small_dataset):
    def nll_of_token(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        return TokenScores(jnp.where(where_BT, targets_BT.astype(jnp.float32), 0.0), where_BT)

    bounds = [
        bound_of(small_dataset, nll_of_token, max_batches=2, **chosen).nats_per_token
        for chosen in (*({"subset_seed": seed} for seed in (0, 1, 2, None)), {})
    ]
    assert len(set(bounds)) == 4
    # as `train` evaluates: not the first rows of the split, which None would take
    assert bounds[4] == bounds[0]


def test_a_single_batch_has_a_bound_and_no_standard_error(small_dataset):
    bound = bound_of(small_dataset, max_batches=1)
    assert bound.num_tokens == 8 * SEQUENCE_LENGTH
    assert bound.nats_per_token == pytest.approx(NATS, rel=1e-5)
    assert math.isnan(bound.standard_error)
    assert math.isnan(bound.bits_per_byte_standard_error)


def surprise_is_the_document(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
    return TokenScores(jnp.where(where_BT, segment_ids_BT, 0.0), where_BT)


@pytest.mark.parametrize(("attend_across_documents", "nats"), [(True, 1.0), (False, 1.75)])
def test_documents_of_a_row_are_told_apart_where_they_may_not_see_each_other(
    tmp_path, attend_across_documents, nats
):
    """Rows of two documents, of which the second holds three quarters of the tokens."""
    rows = np.full(40 * SEQUENCE_LENGTH, 97, np.int32)
    (tmp_path / "data").mkdir()
    write_dataset(
        tmp_path / "data",
        {"heldout": rows},
        starts=(0, SEQUENCE_LENGTH // 4),
    )
    bound = bound_of(
        tmp_path / "data",
        surprise_is_the_document,
        attend_across_documents,
        num_draws=8,
    )
    # by chance some rows have more masks in one document than in the other
    assert bound.nats_per_token == pytest.approx(nats, abs=max(5 * bound.standard_error, 1e-5))
    assert bound.standard_error < 0.06
