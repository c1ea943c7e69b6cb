"""Which of the tokens proposed in a step are kept: a rule gives confidences, and the most confident
are revealed.
"""

import jax
import jax.numpy as jnp


def low_confidence(logits_BTV, choices_BT, keys_B):
    """The probability of the proposed token, so that the least certain positions stay masked
    (LLaDA, algorithm 5).

    Always float32 and never tempered: in bfloat16 the probabilities saturate at 1.0 and their order
    becomes arbitrary.

    Args:
        logits_BTV: float32, after guidance, without noise.
        choices_BT: int32 proposed tokens.
        keys_B: one random key a row (unused).

    Returns:
        confidence_BT float32; greater is kept first.
    """
    chosen_BT = jnp.take_along_axis(logits_BTV, choices_BT[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1))


def random(logits_BTV, choices_BT, keys_B):
    """A uniform draw per position, so that the order of revealing is uniform (LLaDA, algorithm 4)."""
    return jax.vmap(lambda key: jax.random.uniform(key, choices_BT.shape[1:]))(keys_B)


REMASKING = {"low_confidence": low_confidence, "random": random}
