"""What stops a run because its numbers are wrong."""

import numpy as np

from llada_jax.errors import NumericsError


def check_finite(sums: dict, *, interval: tuple[int, int], saved, rate: str) -> None:
    """Raises NumericsError when the loss or a norm of the interval is not finite.

    The norm of the parameters is looked at as well: an update may overflow them in a step whose own
    loss and gradient were still finite, and that state must not be saved as a good one.

    Args:
        sums: {name: (sum, count)} on the host.
        interval: first and last step of the sums. saved: Checkpoints, to name the last good step.
        rate: the knob to lower, see llada_jax.config.learning_rate_knob.
    """
    for name in ("loss", "grad_norm", "param_norm"):
        total = sums[name][0]
        if np.isfinite(total):
            continue
        # a save may still be under way in the background: only a finished one is a way back
        saved.wait()
        good = (
            f"the last good checkpoint is step {saved.steps[-1]}"
            if saved.steps
            else "no checkpoint was saved yet"
        )
        raise NumericsError(
            f"{name} is {total} somewhere in steps {interval[0]} to {interval[1]}; {good}: lower "
            f"{rate} and start the same command again."
        )


def check_skipped(sums: dict, limit: int, *, interval: tuple[int, int], rate: str) -> None:
    """Raises NumericsError when more updates were skipped in an interval than
    config.optimizer.max_skipped_updates, which is `limit`; interval, rate: see check_finite.
    """
    num_skipped = int(sums["skipped"][0])
    if num_skipped > limit:
        raise NumericsError(
            f"{num_skipped} updates in steps {interval[0]} to {interval[1]} were not finite and "
            f"were skipped, and config.optimizer.max_skipped_updates allows {limit}; lower "
            f"{rate}, or leave these data out with `llada-jax rollback`."
        )
