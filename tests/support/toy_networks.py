"""Toy networks for tests of the samplers, in the shape in which samplers call a network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# 16 tokens: XLA takes seconds longer to compile random numbers of an odd shape on a CPU.
VOCAB, MASK, PAD, EOS = 16, 15, 0, 14


def windowed(logits_of_row):
    """Returns the function that samplers call, from one that returns the logits of whole rows."""

    @functools.wraps(logits_of_row)
    def logits_fn(*args, start, length):
        return jax.lax.dynamic_slice_in_dim(logits_of_row(*args), start, length, axis=1)

    return logits_fn


def with_likely_padding(logits_fn, *, num_rows: int = 40):
    """Returns a network whose embedding has more rows than its tokenizer has ids, and which finds
    those rows likelier than any id.
    """

    def padded(*args, **window):
        logits_BTV = logits_fn(*args, **window)
        return jnp.pad(logits_BTV, ((0, 0), (0, 0), (0, num_rows)), constant_values=99.0)

    return padded


def toy_params(seed=0, width=16) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "token": rng.normal(size=(VOCAB, width)).astype(np.float32),
        "position": rng.normal(size=(64, width)).astype(np.float32),
        "out": rng.normal(size=(width, VOCAB)).astype(np.float32),
    }


def toy_logits_of_row(params, tokens_BT, segment_ids_BT, positions_BT):
    """Logits that depend on every real token and its position, and on nothing in the padding."""
    x_BTD = jnp.asarray(params["token"])[tokens_BT] + jnp.asarray(params["position"])[positions_BT]
    mixed_BTD = jnp.sin(x_BTD * (1.0 + jnp.asarray(params["position"])[positions_BT]))
    total_BD = jnp.sum(jnp.where(segment_ids_BT[..., None] > 0, mixed_BTD, 0.0), axis=1)
    return jnp.sin(x_BTD + total_BD[:, None]) @ params["out"]


toy_logits = windowed(toy_logits_of_row)


@windowed
def fixed_distribution(params, tokens_BT, segment_ids_BT, positions_BT):
    """The same logits `params` at every position, whatever the tokens are."""
    return jnp.broadcast_to(params, (*tokens_BT.shape, VOCAB))


def eos_after(columns_B):
    """A network that proposes EOS in generated column columns_B[row] and token 3 elsewhere; prompts
    consist of the token 1.
    """

    @windowed
    def logits_fn(params, tokens_BT, segment_ids_BT, positions_BT):
        prompt_length_B = jnp.sum((segment_ids_BT > 0) & (tokens_BT == 1), axis=1)
        is_eos_BT = positions_BT - prompt_length_B[:, None] == jnp.asarray(columns_B)[:, None]
        return 5.0 * jax.nn.one_hot(jnp.where(is_eos_BT, EOS, 3), VOCAB)

    return logits_fn


def without_tokens(canvas) -> dict:
    """Returns the keyword arguments of `denoise` that a Canvas gives."""
    return {
        "is_fixed_BT": canvas.is_fixed_BT,
        "segment_ids_BT": canvas.segment_ids_BT,
        "positions_BT": canvas.positions_BT,
    }
