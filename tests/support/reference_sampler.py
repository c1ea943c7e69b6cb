"""The reverse process of the toy network in plain numpy, one prompt at a time, without padding."""

from collections.abc import Sequence

import jax
import numpy as np

from llada_jax.rng import key_for
from support.toy_networks import MASK, VOCAB, toy_logits_of_row


def gumbel_noise(seed: int, row: int, step: int, places: np.ndarray) -> np.ndarray:
    """Returns what row `row` of a request draws at some positions in a step, [positions, V]: from
    the key folded with purpose, seed, step and row, the first half of its split, folded with the
    position.
    """
    key = jax.random.fold_in(jax.random.fold_in(key_for("sampling", seed), step), row)
    token_key, _ = jax.random.split(key)
    keys = [jax.random.fold_in(token_key, int(place)) for place in places]
    return np.asarray([jax.random.gumbel(key, (VOCAB,), mode="high") for key in keys])


def reference_generate(
    params,
    prompt,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
    row: int = 0,
    eos_id: int | Sequence[int] | None = None,
    eos: str = "free",
    ends_early: bool = False,
) -> np.ndarray:
    """Returns the tokens after one prompt by the published algorithm.

    Args:
        temperature, seed, row: above 0, argmax(l + T g) with the Gumbel noise of the row.
        eos_id: what ends a text, EOS first: once a block is finished, all that was generated after
            the first of them becomes EOS.
        eos: "never": EOS has no probability; "last": what ends a text is kept after all else, from
            left to right.
        ends_early: after every step instead, as a sampler must not.
    """

    def logits_of(canvas):
        places = np.arange(len(canvas))[None]
        row_logits = toy_logits_of_row(params, canvas[None], np.ones((1, len(canvas)), int), places)
        return np.array(row_logits[0], np.float64)

    ends = [] if eos_id is None else np.atleast_1d(eos_id)
    canvas = np.array([*prompt, *[MASK] * gen_length])
    is_prompt = np.arange(len(canvas)) < len(prompt)
    num_blocks = gen_length // block_length
    steps_per_block = steps // num_blocks
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        places = np.arange(start, start + block_length)
        # of given tokens in a prompt that are the mask token, none is generated
        hidden = {i for i in places if canvas[i] == MASK}
        num_hidden = len(hidden)
        for step in range(steps_per_block):
            base, remainder = divmod(num_hidden, steps_per_block)
            logits = logits_of(canvas)
            if cfg_scale:
                un = logits_of(np.where(is_prompt, MASK, canvas))
                logits = un + (cfg_scale + 1) * (logits - un)
            if eos == "never":
                logits[:, ends[0]] = -np.inf
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            noisy = logits.copy()
            if temperature:
                number = block * steps_per_block + step
                noise = gumbel_noise(seed, row, number, places)
                noisy[places] += temperature * noise
            noisy[:, MASK] = -np.inf
            choice = noisy.argmax(-1)
            sure = p[np.arange(len(canvas)), choice]
            if eos == "last":
                sure[np.isin(choice, ends)] = -1.0
            candidates = sorted(hidden, key=lambda i: (-sure[i], i))
            for i in candidates[: base + (step < remainder)]:
                canvas[i] = choice[i]
                hidden.remove(i)
            is_finished = step == steps_per_block - 1
            is_end = np.isin(canvas, ends) & ~is_prompt
            if (is_finished or ends_early) and is_end.any():
                canvas[np.argmax(is_end) + 1 :] = ends[0]
                hidden = {i for i in hidden if canvas[i] == MASK}
    assert MASK not in canvas[len(prompt) :]
    return canvas[len(prompt) :]
