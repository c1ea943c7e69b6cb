"""The bound on one split of a dataset, for `evaluate` and for the evaluations of `train`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster import sharding
from llada_jax.data.loader import heldout_batches
from llada_jax.data.records import DatasetInfo
from llada_jax.evaluation import likelihood
from llada_jax.objectives.objective import Objective
from llada_jax.units import bits_per_byte


class SplitBound(NamedTuple):
    """The bound on one split; standard errors are nan where fewer than two batches were scored.

    nats_per_token: mean over all scored tokens, in nats. bits_per_byte: the same in bits per UTF-8
    byte, which models with different tokenizers share. num_tokens: scored, each counted once
    however often its row was corrupted. means: of the metrics of Objective.heldout.
    """

    nats_per_token: float
    standard_error: float
    num_tokens: int
    means: dict[str, float]
    bits_per_byte: float
    bits_per_byte_standard_error: float


def rows_at_a_time(batch_size: int, num_records: int, mesh: Mesh) -> int:
    """Returns the rows of a batch: no more than a split of `num_records` needs, or a large batch
    would be filled with rows that hold nothing, and rounded up to what the mesh splits evenly.
    """
    ways = sharding.axis_size(mesh, "act_batch")
    return -(-min(batch_size, 1 << (num_records - 1).bit_length()) // ways) * ways


def placed_batches(
    dataset: str | DatasetInfo,
    *,
    batch_size: int,
    sequence_length: int,
    batch_sharding: NamedSharding,
    on_batch: Callable[[], None] = lambda: None,
    **settings,
) -> Iterator[dict]:
    """Yields the batches of a split on the devices.

    Args:
        on_batch: called before each batch.
        settings: of llada_jax.data.loader.heldout_batches.
    """
    rows = sharding.local_rows(batch_sharding, (batch_size, sequence_length))
    for batch in heldout_batches(
        dataset, batch_size=batch_size, sequence_length=sequence_length, rows=rows, **settings
    ):
        on_batch()
        yield sharding.place_batch(batch, rows, batch_size, batch_sharding)


def bound_of_split(
    model,
    params,
    dataset: str | DatasetInfo,
    *,
    split: str,
    objective: Objective,
    bytes_per_token: float,
    batch_size: int,
    sequence_length: int,
    batch_sharding: NamedSharding,
    attend_across_documents: bool,
    frozen: dict | None = None,
    max_batches: int | None = None,
    subset_seed: int = 0,
    seed: int = 0,
    num_draws: int = 1,
    scored: list[tuple[float, ...]] | None = None,
    on_batch: Callable[[], None] = lambda: None,
    on_compiled: Callable[[], None] = lambda: None,
) -> SplitBound:
    """Scores a split of a dataset, or a random subset of it.

    Args:
        model: llada_jax.models.model.Model. params: its parameters, on the mesh.
        dataset: it, or its directory.
        objective: its bound is computed; the same object in every call, so that the compiled
            program is found again.
        frozen: the frozen parameters of the state, if the bound reads any.
        bytes_per_token: of the split.
        batch_size: rows at a time, over all processes; the last batch is filled with empty rows.
        batch_sharding: of a [batch_size, sequence_length] array. Each process reads the rows that
            its devices hold.
        max_batches: scores a random subset of this many, the same in every call with the same
            subset_seed; None: the whole split.
        seed: of the corruptions. num_draws: corruptions drawn for each row.
        scored: see llada_jax.evaluation.likelihood.bound.
        on_batch: called before each batch. on_compiled: called once, after compiling.

    Raises:
        UserError: the dataset cannot be read, or a record is damaged.
    """
    batches = placed_batches(
        dataset,
        split=split,
        batch_size=batch_size,
        sequence_length=sequence_length,
        batch_sharding=batch_sharding,
        max_batches=max_batches,
        subset_seed=subset_seed,
        attend_across_documents=attend_across_documents,
        on_batch=on_batch,
    )
    # Without it the model states no sharding: XLA has every device compute all rows, and refuses
    # the kernel of TPUs, which it cannot split. Batches are never on an abstract mesh.
    with jax.set_mesh(batch_sharding.mesh):  # type: ignore[arg-type]
        bound = likelihood.bound(
            objective,
            model.nll_fn,
            params,
            batches,
            frozen=frozen,
            num_rows=batch_size,
            seed=seed,
            num_draws=num_draws,
            scored=scored,
            on_compiled=on_compiled,
        )
    return SplitBound(
        *bound,
        bits_per_byte(bound.nats_per_token, bytes_per_token=bytes_per_token),
        bits_per_byte(bound.standard_error, bytes_per_token=bytes_per_token),
    )
