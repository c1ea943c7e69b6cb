"""Next-token sampling from a causal network: the control of every comparison with diffusion.

The row that the network reads begins with BOS and holds each token one place later than the
text does, as in llada_jax.objectives.autoregressive: the logits at a position are those of the
token at that position. Keys and values are cached, which is exact under a causal mask, so that each
token costs one pass over one column.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from llada_jax.rng import key_for, keys_for_rows
from llada_jax.samplers.canvas import make_canvas
from llada_jax.samplers.choice import pick_tokens, without_ids
from llada_jax.samplers.network import checked, place_everywhere, sharding_beside
from llada_jax.samplers.settings import (
    check_options,
    check_proposals,
    check_request,
    check_schedule,
)


class _Fixed(NamedTuple):
    """Arrays and numbers that no step changes, all traced."""

    segment_ids_BT: Array
    positions_BT: Array
    row_B: Array
    mask_id: Array
    fill_id: Array  # -1 when nothing ends a row
    eos_ids_n: Array
    suppress_n: Array
    temperature: Array
    top_k: Array
    top_p: Array
    num_ids: Array


@partial(jax.jit, static_argnames=("gen_length", "is_stochastic", "is_filtered"))
def _continue_rows(
    cached_fn: Callable,
    shifted_BT: Array,
    key: Array,
    fixed: _Fixed,
    *,
    gen_length: int,
    is_stochastic: bool,
    is_filtered: bool,
) -> tuple[Array, Array]:
    """Returns the generated tokens, int32 [B, gen_length], and the passes of each row, int32 [B].

    shifted_BT: BOS and the prompt, so placed that the last token of the prompt is what the network
        reads at the first generated position.
    """
    B, T = shifted_BT.shape
    first = T - gen_length

    def choose(logits_BTV: Array, number: Array) -> Array:
        logits_BTV = checked(logits_BTV, num_rows=B, length=1)
        keys_B = keys_for_rows(jax.random.fold_in(key, number), fixed.row_B)
        choices_BT = pick_tokens(
            without_ids(logits_BTV, fixed.suppress_n),
            keys_B,
            jax.lax.dynamic_slice_in_dim(fixed.positions_BT, first + number, 1, axis=1),
            mask_id=fixed.mask_id,
            num_ids=fixed.num_ids,
            temperature=fixed.temperature,
            top_k=fixed.top_k,
            top_p=fixed.top_p,
            is_stochastic=is_stochastic,
            is_filtered=is_filtered,
        )
        return choices_BT[:, 0]

    def ends(token_B: Array) -> Array:
        return jnp.any(token_B[:, None] == fixed.eos_ids_n, axis=1) & (fixed.fill_id >= 0)

    rows = (fixed.segment_ids_BT, fixed.positions_BT)
    # The columns behind the prompt hold nothing yet. No column before them sees them, and each is
    # written before it is read.
    logits_BTV, cache = cached_fn(shifted_BT, *rows, None, start=first, length=1)
    token_B = choose(logits_BTV, jnp.int32(0))
    generated_BT = jnp.broadcast_to(fixed.fill_id, (B, gen_length)).at[:, 0].set(token_B)
    state = (generated_BT, token_B, ends(token_B), jnp.ones(B, jnp.int32), cache, jnp.int32(1))

    def is_unfinished(state: tuple) -> Array:
        _, _, has_ended_B, _, _, number = state
        return (number < gen_length) & ~jnp.all(has_ended_B)

    def step(state: tuple) -> tuple:
        generated_BT, token_B, has_ended_B, num_steps_B, cache, number = state
        column = first + number
        position_B1 = jax.lax.dynamic_slice_in_dim(fixed.positions_BT, column, 1, axis=1)
        logits_BTV, cache = cached_fn(
            token_B[:, None], fixed.segment_ids_BT, position_B1, cache, start=column, length=1
        )
        token_B = jnp.where(has_ended_B, fixed.fill_id, choose(logits_BTV, number))
        generated_BT = jax.lax.dynamic_update_slice_in_dim(
            generated_BT, token_B[:, None], number, axis=1
        )
        return (
            generated_BT,
            token_B,
            has_ended_B | ends(token_B),
            num_steps_B + ~has_ended_B,
            cache,
            number + 1,
        )

    generated_BT, _, _, num_steps_B, _, _ = jax.lax.while_loop(is_unfinished, step, state)
    return generated_BT, num_steps_B


def continue_tokens(
    cached_fn: Callable,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    mask_id: int,
    pad_id: int,
    bos_id: int,
    gen_length: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    suppress: Sequence[int] = (),
    num_ids: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    noise_numbers: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Generates up to `gen_length` tokens after each prompt, one per pass, from left to right.

    Args:
        cached_fn: of a causal network, taking `params` first, see llada_jax.samplers.network.
        bos_id: the token in front of the prompt.
        The others: see llada_jax.samplers.text.generate_tokens and
            llada_jax.samplers.denoise.denoise. A row that has ended is filled up with EOS.

    Returns:
        tokens int32 [number of prompts, gen_length], and the passes that each row needed, int32.
    """
    check_request(num_prompts=len(prompts), batch_size=batch_size, seed=seed)
    check_schedule(
        gen_length=gen_length,
        block_length=gen_length,
        steps=gen_length,
        temperature=temperature,
        cfg_scale=0.0,
    )
    check_options(
        temperature=temperature, top_k=top_k, top_p=top_p, suppress=suppress, num_ids=num_ids
    )
    check_proposals(suppress, also_off=[mask_id], num_ids=num_ids)
    eos_ids = [eos_id] if isinstance(eos_id, (int, np.integer)) else list(eos_id or ())
    numbers: dict[str, Any] = dict(
        mask_id=np.int32(mask_id),
        fill_id=np.int32(eos_ids[0] if eos_ids and stop_at_eos else -1),
        eos_ids_n=np.asarray(eos_ids, np.int32),
        suppress_n=np.asarray(suppress, np.int32),
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        num_ids=np.int32(np.iinfo(np.int32).max if num_ids is None else num_ids),
    )
    bound = jax.tree_util.Partial(cached_fn, params)
    sharding = sharding_beside(bound)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    batch_size = min(batch_size, len(prompts))
    noise_numbers = range(len(prompts)) if noise_numbers is None else noise_numbers
    tokens_BT = np.empty((len(prompts), gen_length), np.int32)
    num_steps_B = np.empty(len(prompts), np.int32)
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        filled = [min(row, rows[-1]) for row in range(first, first + batch_size)]
        batch = [prompts[row] for row in filled]
        canvas = make_canvas(batch, gen_length=gen_length, mask_id=mask_id, pad_id=pad_id)
        starts_BT = (canvas.positions_BT == 0) & (canvas.segment_ids_BT == 1)
        shifted_BT = np.where(starts_BT, bos_id, np.roll(canvas.tokens_BT, 1, axis=1))
        rows_of_batch: dict[str, Any] = dict(
            segment_ids_BT=canvas.segment_ids_BT,
            positions_BT=canvas.positions_BT,
            row_B=np.array([noise_numbers[row] for row in filled], np.int32),
        )
        fixed = _Fixed(**rows_of_batch, **numbers)
        arguments = place_everywhere((shifted_BT, key_for("sampling", seed), fixed), sharding)
        with jax.set_mesh(mesh) if mesh else nullcontext():  # type: ignore[arg-type]
            generated = _continue_rows(
                bound,
                *arguments,
                gen_length=gen_length,
                is_stochastic=temperature > 0,
                is_filtered=top_k > 0 or top_p < 1,
            )
        generated_BT, num_B = jax.device_get(generated)
        tokens_BT[rows.start : rows.stop] = generated_BT[: len(rows)]
        num_steps_B[rows.start : rows.stop] = num_B[: len(rows)]
    return tokens_BT, num_steps_B
