"""Which of the tokens proposed in a step are kept: a commit rule gives confidences, and the most
confident are revealed.

    rule(logits_BTV, choices_BT, keys_B) -> confidence_BT

Rules are jax functions, traced once per shape. They see one block of the canvas (T is the block
length) and say nothing about how many tokens are revealed: llada_jax.samplers.commit does. One of
your own is named "module:function" wherever a name of REMASKING is expected; docs/extend.md has an
example.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.errors import UserError
from llada_jax.parts import call_part, load_part

# what messages call these functions
KIND = "commit rule"


def low_confidence(logits_BTV: Array, choices_BT: Array, keys_B: Array) -> Array:
    """The probability of the proposed token, so that the least certain positions stay masked
    (LLaDA, algorithm 5).

    Always float32 and never tempered: in bfloat16 the probabilities saturate at 1.0 and their order
    becomes arbitrary.

    Args:
        logits_BTV: float32, after guidance, without noise.
        choices_BT: int32 proposed tokens.
        keys_B: one random key per row (unused).

    Returns:
        confidence_BT float32; the greater is kept first.
    """
    chosen_BT = jnp.take_along_axis(logits_BTV, choices_BT[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1))


def random(logits_BTV: Array, choices_BT: Array, keys_B: Array) -> Array:
    """A uniform draw per position: all orders of revealing are as likely (LLaDA, algorithm 4)."""
    return jax.vmap(lambda key: jax.random.uniform(key, choices_BT.shape[1:]))(keys_B)


def entropies(logits_BTV: Array) -> Array:
    """Returns the entropy of softmax(logits) in nats, float32 [B, T]; logits may be -inf."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    p_BTV = jnp.exp(log_p_BTV)
    return -jnp.sum(p_BTV * jnp.where(p_BTV > 0, log_p_BTV, 0.0), axis=-1)


def entropy(logits_BTV: Array, choices_BT: Array, keys_B: Array) -> Array:
    """The entropy with its sign changed: positions where few tokens are possible come first."""
    return -entropies(logits_BTV)


def margin(logits_BTV: Array, choices_BT: Array, keys_B: Array) -> Array:
    """The probability of the most likely token less that of the second (top-k margin of Kim et
    al., arXiv 2502.06768): positions that are torn between two tokens come late.
    """
    top_BT2 = jax.lax.top_k(logits_BTV, 2)[0]
    p_BT2 = jnp.exp(top_BT2 - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True))
    return p_BT2[..., 0] - p_BT2[..., 1]


REMASKING = {
    "low_confidence": low_confidence,
    "random": random,
    "entropy": entropy,
    "margin": margin,
}


class CommitRule(NamedTuple):
    """A rule with the name it was asked for, which messages need; hashable, for jax.jit."""

    name: str
    function: Callable


def commit_rule(name: str) -> CommitRule:
    """Returns the rule of a name in REMASKING, or the function that "module:function" names.

    Raises:
        UserError: there is no such rule.
    """
    return CommitRule(name, load_part(name, KIND, REMASKING))


def confidences(rule: CommitRule, logits_BTV: Array, choices_BT: Array, keys_B: Array) -> Array:
    """Returns what the rule says, as finite numbers: float32 [B, T].

    A rule may return -inf or NaN. Both become the lowest finite number, because the sampler gives
    -inf to positions that are not hidden: a hidden one that ties with them, or sorts behind them,
    would never be revealed.

    Raises:
        UserError: the rule fails, or returns another shape or dtype. It is raised while the step is
            traced, before anything is computed.
    """
    confidence_BT = call_part(rule.function, rule.name, KIND, logits_BTV, choices_BT, keys_B)
    shape, dtype = (getattr(confidence_BT, name, None) for name in ("shape", "dtype"))
    if shape != choices_BT.shape or dtype != jnp.float32:
        got = type(confidence_BT).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise UserError(
            f"The {KIND} {rule.name!r} returned {got}; it must return float32"
            f"{list(choices_BT.shape)}, one confidence for each position of the block in each row."
        )
    lowest = jnp.finfo(jnp.float32).min
    return jnp.nan_to_num(confidence_BT, nan=lowest, neginf=lowest)
