"""Sampling with tokens that go back to the mask, for the toy network, in plain numpy: one prompt at
a time, without padding, as the papers write it.
"""

import jax
import numpy as np

from llada_jax.rng import key_for
from support.reference_sampler import gumbel_noise
from support.toy_networks import MASK, toy_logits_of_row


def probabilities(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def draws_of(seed: int, row: int, step: int, length: int) -> np.ndarray:
    """Returns the uniform numbers of a block that decide what ReMDM masks again."""
    key = jax.random.fold_in(jax.random.fold_in(key_for("sampling", seed), step), row)
    _, remasking_key = jax.random.split(key)
    return np.asarray(jax.random.uniform(jax.random.fold_in(remasking_key, 1), (length,)))


def reference_revise(
    params,
    prompt,
    *,
    rule: str,
    amount: float,
    gen_length: int,
    block_length: int,
    steps: int,
    threshold: float = 2.0,
    temperature: float = 0.0,
    seed: int = 0,
    row: int = 0,
) -> tuple[np.ndarray, int]:
    """Returns the tokens after one prompt and the number of tokens that were masked again."""

    def logits_of(canvas):
        places = np.arange(len(canvas))[None]
        row_logits = toy_logits_of_row(params, canvas[None], np.ones((1, len(canvas)), int), places)
        return np.array(row_logits[0], np.float64)

    canvas = np.array([*prompt, *[MASK] * gen_length])
    num_blocks = gen_length // block_length
    N = steps // num_blocks
    num_revised = 0
    for block in range(num_blocks):
        places = range(len(prompt) + block * block_length, len(prompt) + (block + 1) * block_length)
        drafted_before = 30
        for step in range(N):
            hidden = [i for i in places if canvas[i] == MASK]
            kept = [i for i in places if canvas[i] != MASK]
            if not hidden:
                break
            logits = logits_of(canvas)
            p = probabilities(logits)
            noisy = logits.copy()
            number = block * N + step
            if temperature:
                noise = gumbel_noise(seed, row, number, np.array(places))
                noisy[list(places)] += temperature * noise
            noisy[:, MASK] = -np.inf
            choice = noisy.argmax(-1)
            order = sorted(hidden, key=lambda i: (-p[i, choice[i]], i))

            # how many stay for good
            count = int(np.ceil(len(hidden) / (N - step)))
            if rule == "remdm-loop":
                first, last = int(0.45 * N), int(0.95 * N)
                if step < first:
                    count = int(
                        np.ceil(max(len(hidden) - round(0.1 * block_length), 0) / (first - step))
                    )
                elif step < last:
                    count = 0
            sure = sum(p[i, choice[i]] > threshold for i in hidden)
            if rule == "wino":
                sure = min(sure, min(max(int(len(hidden) * 0.7), 5), 20))
            count = max(count, sure)

            # which go back
            back = []
            if rule == "wino":
                if count > 1 and step < N - 1:

                    def verified(i):
                        return probabilities(
                            logits_of(np.where(np.arange(len(canvas)) == i, MASK, canvas))
                        )[i, canvas[i]]

                    doubt = sorted((verified(i), i) for i in kept)
                    back = [i for c, i in doubt if c < amount][: drafted_before - 1]
            else:
                draws = draws_of(seed, row, number, block_length)
                left = len(hidden) - count
                greatest = min(1.0, left / max(len(kept), 1))
                chance = {
                    "remdm-cap": min(amount, greatest),
                    "remdm-rescale": amount * greatest,
                    "remdm-loop": amount if int(0.45 * N) <= step < int(0.95 * N) else 0.0,
                }[rule]
                drawn = sorted((draws[i - places[0]], i) for i in kept)
                back = [i for u, i in drawn if u < chance][:left]
                count += len(back)
            for i in order[:count]:
                canvas[i] = choice[i]
            canvas[back] = MASK
            drafted_before = count
            num_revised += len(back)
    assert MASK not in canvas[len(prompt) :]
    return canvas[len(prompt) :], num_revised
