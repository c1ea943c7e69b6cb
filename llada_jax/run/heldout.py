"""The held-out bound while a run trains."""

import math
from collections.abc import Sequence
from pathlib import Path

from llada_jax.data.loader import SourceSummary
from llada_jax.evaluation.splits import bound_of_split
from llada_jax.objectives.objective import Objective


def evaluate_heldout(
    model,
    params,
    summaries: Sequence[SourceSummary],
    *,
    objective: Objective,
    num_batches: int,
    **settings,
) -> dict[str, dict[str, float]]:
    """Returns {group: {bound name, standard_error, bits_per_byte}} of each held-out split.

    A dataset without held-out text is left out. The group is "heldout", or of a mixture
    "heldout_NUMBER_DIRECTORY", because one bound over texts of different kinds says little about
    either.

    Args:
        objective: its bound is computed, and gives the bound's name.
        num_batches: scored of each dataset, the same random rows in every evaluation of every run,
            so that their bounds can be compared; 0: all of the split.
        settings: of llada_jax.evaluation.splits.bound_of_split.
    """
    results = {}
    for number, summary in enumerate(summaries):
        if "heldout" not in summary.bytes_per_token:
            continue
        bound = bound_of_split(
            model,
            params,
            summary.directory,
            split="heldout",
            objective=objective,
            bytes_per_token=summary.bytes_per_token["heldout"],
            max_batches=num_batches or None,
            **settings,
        )
        is_mixture = len(summaries) > 1
        group = f"heldout_{number}_{Path(summary.directory).name}" if is_mixture else "heldout"
        # one batch has no spread, and JSON has no number for that: the key is left out
        error = {} if math.isnan(bound.standard_error) else {"standard_error": bound.standard_error}
        results[group] = {
            objective.bound_name: bound.nats_per_token,
            **error,
            "bits_per_byte": bound.bits_per_byte,
        }
    return results


def bound_line(bound: dict[str, float], name: str) -> str:
    """Returns one group of evaluate_heldout in words, e.g. "1.234 bits/byte (2.345 nats/token +-
    0.012)"; name: Objective.bound_name.
    """
    nats = bound[name]
    error = f" +- {bound['standard_error']:.3f}" if "standard_error" in bound else ""
    return f"{bound['bits_per_byte']:.3f} bits/byte ({nats:.3f} nats/token{error})"
