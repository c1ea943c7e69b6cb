"""A schedule of your own: the learning rate falls in equal steps."""

import jax.numpy as jnp


def staircase(
    *,
    learning_rate: float,
    final_learning_rate: float,
    num_steps: int,
    tokens_per_step: int,
    num_stairs: int = 4,
):
    """Returns step -> learning rate; the warm-up is multiplied on top of it."""
    del tokens_per_step

    def schedule(step):
        stair = jnp.minimum(step * num_stairs // num_steps, num_stairs - 1)
        fall = (learning_rate - final_learning_rate) / max(1, num_stairs - 1)
        return learning_rate - fall * stair

    return schedule
