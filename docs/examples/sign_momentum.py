"""An optimizer of your own: the sign of the momentum (Signum, arXiv 1802.04434)."""

import jax
import jax.numpy as jnp
import optax


def sign_momentum(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns the direction alone: clipping, weight decay and learning rate are added around it."""
    del b2, eps

    def update(gradients, momentum, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, momentum, gradients)
        return jax.tree.map(jnp.sign, momentum), momentum

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
