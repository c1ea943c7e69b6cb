"""The held-out bound while a run trains."""

import math
from pathlib import Path

from llada_jax.cluster import sharding
from llada_jax.data.loader import heldout_batches
from llada_jax.evaluation import likelihood
from llada_jax.units import bits_per_byte


def evaluate_heldout(
    config,
    model,
    objective,
    sources,
    summaries,
    params,
    frozen,
    num_batches,
    *,
    batch_sharding,
    on_batch,
    on_compiled,
) -> dict:
    """Returns {group: {objective.bound_name, standard_error, bits_per_byte, ...}} for the held-out split of
    each dataset.

    In batches as large as a microbatch of training, which is known to fit.
    """
    B, T = (
        config.data.batch_size // config.optimizer.gradient_accumulation,
        config.data.sequence_length,
    )
    rows = sharding.local_rows(batch_sharding, (B, T))
    results = {}
    for number, ((directory, _), summary) in enumerate(zip(sources, summaries)):
        if "heldout" not in summary.bytes_per_token:
            continue
        batches = heldout_batches(
            directory,
            batch_size=B,
            sequence_length=T,
            rows=rows,
            max_batches=num_batches or None,
            attend_across_documents=config.data.attend_across_documents,
        )

        def placed(batches=batches):
            for batch in batches:
                on_batch()
                yield sharding.place_batch(batch, rows, B, batch_sharding)

        bound = likelihood.bound(
            objective,
            model.nll_fn,
            params,
            placed(),
            num_rows=B,
            frozen=frozen,
            on_compiled=on_compiled,
        )
        group = "heldout" if len(sources) == 1 else f"heldout_{number}_{Path(directory).name}"
        error = {} if math.isnan(bound.standard_error) else {"standard_error": bound.standard_error}
        results[group] = {
            objective.bound_name: bound.nats_per_token,
            **error,
            "bits_per_byte": bits_per_byte(
                bound.nats_per_token, bytes_per_token=summary.bytes_per_token["heldout"]
            ),
        }
    return results


def bound_line(bound: dict, name: str) -> str:
    """Returns one group of evaluate_heldout in words; name: Objective.bound_name."""
    nats = bound[name]
    error = f" +- {bound['standard_error']:.3f}" if "standard_error" in bound else ""
    return f"{bound['bits_per_byte']:.3f} bits/byte ({nats:.3f} nats/token{error})"
