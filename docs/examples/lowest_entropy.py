"""A commit rule of your own: the positions with the sharpest distributions are revealed first.

    PYTHONPATH=docs/examples llada-jax sample --checkpoint runs/tiny/run --prompt "It is" \
        --remasking lowest_entropy:lowest_entropy

`low_confidence` looks at the probability of the proposed token alone; this rule also prefers a
position where the other tokens are few.
"""

import jax
import jax.numpy as jnp


def lowest_entropy(logits_BTV, choices_BT, keys_B):
    """Returns the entropy with its sign changed, float32 [B, T]."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    # 0 for suppressed tokens, whose logits are -inf
    p_BTV = jnp.exp(log_p_BTV)
    return jnp.sum(p_BTV * jnp.where(p_BTV > 0, log_p_BTV, 0.0), axis=-1)
