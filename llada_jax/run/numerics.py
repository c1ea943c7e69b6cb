"""What stops a run because its numbers are wrong."""

import numpy as np

from llada_jax.errors import NumericsError


def check_finite(sums: dict, *, step: int, saved, rate: str) -> None:
    """Raises NumericsError when the loss or a norm of the interval is not finite.

    The norm of the parameters is looked at as well: an update may overflow them in a step whose own
    loss and gradient were still finite, and that state must not be saved as a good one.

    Args:
        sums: {name: (sum, count)} on the host.
        step: the last one of the sums. saved: Checkpoints, to name the last good step.
        rate: the knob to lower, see llada_jax.config.learning_rate_knob.
    """
    for name in ("loss", "grad_norm", "param_norm"):
        total = sums[name][0]
        if np.isfinite(total):
            continue
        raise NumericsError(
            f"{name} is {total} somewhere in steps {_interval(sums, step)}; {_last_good(saved)}: "
            f"lower {rate} and start the same command again."
        )


def check_skipped(sums: dict, limit: int, *, step: int, saved, rate: str) -> None:
    """Raises NumericsError when more updates were skipped in an interval than
    config.optimizer.max_skipped_updates, which is `limit`; step, saved, rate: see check_finite.
    """
    num_skipped = int(sums["skipped"][0])
    # Without a limit nothing is skipped, and what is counted is of an earlier start, which had one.
    if limit and num_skipped > limit:
        raise NumericsError(
            f"{num_skipped} updates in steps {_interval(sums, step)} were not finite and were "
            f"skipped, and config.optimizer.max_skipped_updates allows {limit}; "
            f"{_last_good(saved)}: lower {rate}, or leave these data out with `llada-jax rollback`."
        )


def _interval(sums: dict, step: int) -> str:
    """Returns "FIRST to LAST", the steps of the sums, which may begin before this start."""
    # each step adds one to the count of every metric that it always has
    return f"{step - max(int(sums['skipped'][1]), 1) + 1} to {step}"


def _last_good(saved) -> str:
    # a save may still be under way in the background: only a finished one is a way back
    saved.wait()
    if saved.steps:
        return f"the last good checkpoint is step {saved.steps[-1]}"
    return "no checkpoint was saved yet"
