"""A network that knows one sentence by heart, for tests that read what was sampled."""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.data.tokenizer import load_tokenizer
from support.toy_networks import windowed

BYTES = load_tokenizer("bytes")
SENTENCE = "it is a truth universally acknowledged, "


def letters(text: str) -> np.ndarray:
    """Returns the parameters of `recite`: the bytes of a text, and EOS behind a full stop."""
    return np.array([*text.encode(), *[BYTES.eos_id] * text.endswith(".")], np.int32)


@windowed
def recite(params, tokens_BT, segment_ids_BT, positions_BT):
    """A network that knows one sentence by heart: the letter at a position depends on the position
    alone.
    """
    sentence_S = jnp.asarray(params)
    return 9.0 * jax.nn.one_hot(sentence_S[positions_BT % len(sentence_S)], BYTES.vocab_size)
