"""The reverse process: a canvas of masks becomes tokens, some in every step, block after block.

This is the sampler of LLaDA (arXiv 2502.09992, algorithms 4 and 5, section 2.4 and appendix B.4).
With one block as long as the generation it is pure diffusion; with more blocks it is
semi-autoregressive: later blocks are seen as masks while an earlier one is denoised. What was
revealed is never revised.

The network is one function, and the only thing that is asked of it are the logits of a window of
columns:

    logits_fn(tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> float32 [B, length, V]

It sees the whole canvas, and nothing is ever computed at the size of canvas times vocabulary,
because only the current block is read.

Three deliberate differences from the published code, none of which changes what it produces on
ordinary input:
- `mask_id` is never chosen. There, a position that draws the mask token silently stays hidden, its
  turn is lost, and masks can remain in the result. Only the choice is restricted: confidences still
  come from the full softmax.
- The prompt is what `is_fixed_BT` says, not what differs from `mask_id`, so a prompt may contain
  the mask token.
- Confidences are float32 whatever the model computes in.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.errors import UserError
from llada_jax.rng import keys_for_rows
from llada_jax.samplers.remasking import CommitRule, commit_rule, confidences

# Prompts are padded to a multiple of this many tokens, so that prompts of similar length share one
# compiled step.
PROMPT_BUCKET = 32

# How many steps may be dispatched but not finished: enough to hide the host's work. Dozens of them
# deadlock where several processes share a mesh of CPU devices, because the programs that wait for
# their turn hold the threads on which the collectives would meet.
MAX_STEPS_IN_FLIGHT = 2


class Canvas(NamedTuple):
    """What a sampler starts from: numpy arrays [B, T], T = padded prompt length + gen_length."""

    tokens_BT: np.ndarray  # int32: padding, prompt, then gen_length masks
    is_fixed_BT: np.ndarray  # bool: padding and prompt, never changed
    segment_ids_BT: np.ndarray  # int32: 0 padding, 1 everything else
    positions_BT: np.ndarray  # int32: 0 at the first token of the prompt


class DenoiseStep(NamedTuple):
    """What one step has done. Arrays stay on the device until they are read."""

    canvas_BT: jax.Array  # int32, after the step
    is_new_BT: jax.Array  # bool: masked before the step, revealed (or filled with EOS) by it
    step: int  # 1 ... num_steps
    num_steps: int
    block: int  # 1 ... num_blocks
    num_blocks: int


def make_canvas(
    prompts: Sequence[Sequence[int]], *, gen_length: int, mask_id: int, pad_id: int
) -> Canvas:
    """Lays out prompts of any lengths: padded on the LEFT to a common width that is a multiple of
    PROMPT_BUCKET, each followed by `gen_length` masks.

    Left padding keeps every prompt next to its generation and the generation in the same columns of
    all rows. The padding has segment 0, so no real token attends to it, and positions start behind
    it: a row gets the logits that it would get alone.
    """
    longest = max(len(prompt) for prompt in prompts)
    prompt_width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    shape = (len(prompts), prompt_width + gen_length)
    tokens_BT = np.full(shape, mask_id, np.int32)
    tokens_BT[:, :prompt_width] = pad_id
    first_B = np.array([prompt_width - len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens_BT[row, first_B[row] : prompt_width] = prompt
    column_T = np.arange(shape[1])
    return Canvas(
        tokens_BT=tokens_BT,
        is_fixed_BT=np.broadcast_to(column_T < prompt_width, shape),
        segment_ids_BT=(column_T >= first_B[:, None]).astype(np.int32),
        positions_BT=np.maximum(column_T - first_B[:, None], 0).astype(np.int32),
    )


def check_schedule(
    *, gen_length: int, block_length: int, steps: int, temperature: float, cfg_scale: float
) -> None:
    """Raises UserError unless the blocks tile the generation and the steps divide evenly among the
    blocks.
    """
    for name, value in (
        ("gen_length", gen_length),
        ("block_length", block_length),
        ("steps", steps),
    ):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if gen_length % block_length:
        divisors = [n for n in range(1, gen_length + 1) if gen_length % n == 0]
        raise UserError(
            f"block_length={block_length} must divide gen_length={gen_length}; "
            f"nearest: {min(divisors, key=lambda n: abs(n - block_length))}."
        )
    num_blocks = gen_length // block_length
    if steps % num_blocks:
        lower = steps // num_blocks * num_blocks
        nearest = f"{lower} or {lower + num_blocks}" if lower else f"{num_blocks}"
        raise UserError(
            f"steps={steps} must be a multiple of the number of blocks, gen_length/block_length = "
            f"{gen_length}/{block_length} = {num_blocks}; nearest: {nearest}."
        )
    if steps > gen_length:
        raise UserError(
            f"steps={steps} must not exceed gen_length={gen_length}, because every step reveals at "
            "least one token; "
            f"use steps={gen_length}."
        )
    for name, strength in (("temperature", temperature), ("cfg_scale", cfg_scale)):
        if not 0 <= strength < float("inf"):
            raise UserError(
                f"{name}={strength} must be a finite number that is not negative; use 0 to switch "
                "it off."
            )


def _pick_tokens(
    logits_BTV: Array,
    keys_B: Array,
    *,
    mask_id: Array,
    num_ids: Array,
    temperature: Array,
    is_stochastic: bool,
) -> Array:
    """Returns the proposed token of every position, int32 [B, T]; never `mask_id`, and below
    `num_ids`.

    Gumbel-max: argmax(l + T g) draws from softmax(l / T), and equals the published argmax(exp(l) /
    (-log u)^T). mode="high": the float32 uniform behind the default mode has too few bits for the
    tail of a large vocabulary (arXiv 2409.02908), which is why the published code resorts to
    float64.
    """
    if is_stochastic:

        def noise(key: Array) -> Array:
            return jax.random.gumbel(key, logits_BTV.shape[1:], mode="high")

        logits_BTV = logits_BTV + temperature * jax.vmap(noise)(keys_B)
    id_V = jnp.arange(logits_BTV.shape[-1])
    is_excluded_V = (id_V == mask_id) | (id_V >= num_ids)
    return jnp.argmax(jnp.where(is_excluded_V, -jnp.inf, logits_BTV), axis=-1).astype(jnp.int32)


def _window_logits(
    logits_fn: Callable,
    tokens_BT: Array,
    segment_ids_BT: Array | None,
    positions_BT: Array,
    *,
    start: Array,
    length: int,
) -> Array:
    """Calls logits_fn and returns float32 [B, length, V]; UserError for any other shape."""
    logits_BTV = logits_fn(tokens_BT, segment_ids_BT, positions_BT, start=start, length=length)
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != (len(tokens_BT), length):
        raise UserError(
            f"logits_fn returned logits of shape {logits_BTV.shape} for length={length}; it must "
            "return those of the columns start ... start + length - 1 alone, shape [B, length, V] "
            f"= [{len(tokens_BT)}, {length}, V]."
        )
    return logits_BTV.astype(jnp.float32)


def _guided_logits(
    logits_fn: Callable, canvas_BT: Array, fixed: "_Fixed", *, start: Array, length: int
) -> Array:
    """Classifier-free guidance: un + (w + 1)(l - un), where `un` saw the prompt masked; one pass of
    twice the batch.
    """
    unprompted_BT = jnp.where(fixed.is_fixed_BT, fixed.mask_id, canvas_BT)
    rows = (
        jnp.concatenate([canvas_BT, unprompted_BT]),
        jnp.tile(fixed.segment_ids_BT, (2, 1)),
        jnp.tile(fixed.positions_BT, (2, 1)),
    )
    both_BTV = _window_logits(logits_fn, *rows, start=start, length=length)
    logits_BTV, unprompted_BTV = jnp.split(both_BTV, 2)
    return unprompted_BTV + (fixed.cfg_scale + 1) * (logits_BTV - unprompted_BTV)


def _fill_after_eos(canvas_BT: Array, is_generated_BT: Array, eos_id: Array) -> Array:
    """Ends a row at its first generated EOS: everything it generates after that is EOS too."""
    is_eos_BT = (canvas_BT == eos_id) & is_generated_BT
    is_after_BT = jnp.cumsum(is_eos_BT, axis=1) > 0
    return jnp.where(is_after_BT & is_generated_BT, eos_id, canvas_BT)


class _Fixed(NamedTuple):
    """Arrays and numbers that no step changes. All traced: another value of any of them reuses the
    compiled step.
    """

    is_fixed_BT: jax.Array
    segment_ids_BT: jax.Array
    positions_BT: jax.Array
    row_B: jax.Array  # number of each row in the whole request, whatever batch it is in
    mask_id: jax.Array
    eos_id: jax.Array  # -1 when nothing ends a row
    steps_per_block: jax.Array
    temperature: jax.Array
    cfg_scale: jax.Array
    num_ids: jax.Array


@partial(
    jax.jit,
    static_argnames=(
        "gen_length",
        "block_length",
        "rule",
        "is_stochastic",
        "is_guided",
        "sharding",
    ),
)
def _denoise_step(
    logits_fn: Callable,
    canvas_BT: Array,
    step: Array,
    key: Array,
    fixed: _Fixed,
    *,
    gen_length: int,
    block_length: int,
    rule: CommitRule,
    is_stochastic: bool,
    is_guided: bool,
    sharding: jax.sharding.Sharding | None,
) -> tuple[Array, Array, Array, Array]:
    """One step of the reverse process; returns (canvas_BT, is_new_BT, number of the next step,
    whether it is done).

    Static arguments decide what is compiled, and each of their combinations is compiled once. What
    only changes numbers is traced: the step, the schedule, ids, temperature and guidance strength.
    """
    # 1. Where we are. Only the current block is read and written, so logits, noise and softmax
    # cover it alone. `start` is traced: all blocks share one program.
    block, step_in_block = jnp.divmod(step, fixed.steps_per_block)
    steps_left = fixed.steps_per_block - step_in_block
    start = canvas_BT.shape[1] - gen_length + block * block_length

    def in_block(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, block_length, axis=1)

    is_generated_BT = ~fixed.is_fixed_BT & (
        jnp.arange(canvas_BT.shape[1]) >= canvas_BT.shape[1] - gen_length
    )
    tokens_BT = in_block(canvas_BT)
    is_hidden_BT = in_block(is_generated_BT) & (tokens_BT == fixed.mask_id)

    # 2. The whole canvas through the network, the current block through its head. Logits of the
    # whole canvas would be the largest array by far, and thrown away: at 16 rows of 768 tokens and
    # a vocabulary of 126,464 they take 5.8 GiB.
    if is_guided:
        logits_BTV = _guided_logits(logits_fn, canvas_BT, fixed, start=start, length=block_length)
    else:
        rows = (canvas_BT, fixed.segment_ids_BT, fixed.positions_BT)
        logits_BTV = _window_logits(logits_fn, *rows, start=start, length=block_length)

    # 3. Keys fold (step, row): neither the other rows of the batch nor the padding change what a
    # row draws.
    keys_B = keys_for_rows(jax.random.fold_in(key, step), fixed.row_B)
    token_keys_B, remasking_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)

    # 4. A proposal for every position, and the confidence in it.
    choices_BT = _pick_tokens(
        logits_BTV,
        token_keys_B,
        mask_id=fixed.mask_id,
        num_ids=fixed.num_ids,
        temperature=fixed.temperature,
        is_stochastic=is_stochastic,
    )
    confidence_BT = confidences(rule, logits_BTV, choices_BT, remasking_keys_B)
    confidence_BT = jnp.where(is_hidden_BT, confidence_BT, -jnp.inf)

    # 5. Reveal the most confident. ceil(hidden / steps left) is the published count: hidden //
    # steps, and one more in each of the first hidden % steps steps. It is counted from what is
    # still hidden, so a row with given tokens inside the block reveals fewer per step. Ranks, and
    # not top_k, whose k would have to be static; ties go to the left.
    count_B = -(-jnp.sum(is_hidden_BT, axis=1) // steps_left)
    rank_BT = jnp.argsort(jnp.argsort(-confidence_BT, axis=1, stable=True), axis=1)
    is_revealed_BT = is_hidden_BT & (rank_BT < count_B[:, None])
    tokens_BT = jnp.where(is_revealed_BT, choices_BT, tokens_BT)
    new_canvas_BT = jax.lax.dynamic_update_slice_in_dim(canvas_BT, tokens_BT, start, axis=1)

    # 6. A row that has met EOS in a finished block is complete. Not before its block is finished:
    # positions in front of the EOS are still hidden until then, and may reveal an earlier one.
    ended_BT = _fill_after_eos(new_canvas_BT, is_generated_BT, fixed.eos_id)
    new_canvas_BT = jnp.where(steps_left == 1, ended_BT, new_canvas_BT)

    is_left_BT = is_generated_BT & (new_canvas_BT == fixed.mask_id)
    is_new_BT = is_generated_BT & (canvas_BT == fixed.mask_id) & ~is_left_BT
    result = (new_canvas_BT, is_new_BT, step + 1, ~jnp.any(is_left_BT))
    # Placed like its input, or the second step would be compiled again for another placement.
    return result if sharding is None else jax.lax.with_sharding_constraint(result, sharding)


def _sharding_beside(logits_fn: Callable) -> jax.sharding.Sharding | None:
    """Returns where the canvas belongs: whole on every device that holds parameters of `logits_fn`;
    None if no parameters are bound to it.
    """
    shardings = [
        leaf.sharding for leaf in jax.tree.leaves(logits_fn) if isinstance(leaf, jax.Array)
    ]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return shardings[0] if shardings else None


def denoise(
    logits_fn: Callable,
    canvas_BT: Any,
    key: Array,
    *,
    mask_id: int,
    is_fixed_BT: np.ndarray | Array,
    segment_ids_BT: np.ndarray | Array,
    positions_BT: np.ndarray | Array,
    gen_length: int,
    block_length: int,
    steps: int,
    remasking: str = "low_confidence",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    eos_id: int | None = None,
    first_row: int = 0,
    num_ids: int | None = None,
) -> Iterator[DenoiseStep]:
    """Runs the reverse process and yields after every step.

    One step is compiled for each (batch, T, gen_length, block_length, remasking, temperature > 0,
    cfg_scale > 0); steps, blocks, prompts, ids, temperatures and scales reuse it.

    Args:
        logits_fn: (tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> logits [B, length,
            V] of the columns start ... start + length - 1; `start` is traced and `length` is an
            int. Pass `jax.tree_util.Partial(fn, params)` for a real model: its parameters are then
            arguments of the compiled step, not constants baked into it.
        canvas_BT: int32; `mask_id` where a token is to be generated. The last `gen_length` columns
            are generated.
        key: random key; row r at step s draws from fold(key, s, first_row + r). At temperature 0
            with low_confidence it changes nothing.
        is_fixed_BT: bool; padding and prompt (also given tokens inside the generation), never
            changed.
        segment_ids_BT, positions_BT: int32, handed to `logits_fn`; segment 0 is padding.
        gen_length, block_length, steps: block_length divides gen_length, the number of blocks
            divides steps.
        remasking: which proposals a step keeps: a name in llada_jax.samplers.remasking.REMASKING,
            or "module:function" for an own rule.
        temperature: 0 takes the most likely token, 1 samples the model's distribution.
        cfg_scale: guidance strength w; 0 means none, otherwise the network runs on twice the batch.
        eos_id: ends a row: after a block that contains it, the rest of the row is filled with it,
            and when every row has ended no further step runs. None (as published) generates all
            gen_length tokens.
        num_ids: only ids below this are generated: the embedding may have more rows than the
            tokenizer has ids. None (as published): every row of the embedding.
        first_row: number of the first row in the whole request, when the request is cut into
            batches.

    Raises:
        UserError: the schedule does not divide evenly, the remasking is unknown, or an own rule or
            logits_fn returns another shape or dtype than it must (found before the first step).
    """
    check_schedule(
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        temperature=temperature,
        cfg_scale=cfg_scale,
    )
    rule = commit_rule(remasking)
    if not isinstance(logits_fn, jax.tree_util.Partial):
        logits_fn = jax.tree_util.Partial(logits_fn)
    num_blocks = gen_length // block_length
    # numpy values here, which device_put makes the arrays that the fields promise
    host: dict[str, Any] = dict(
        is_fixed_BT=np.asarray(is_fixed_BT, bool),
        segment_ids_BT=np.asarray(segment_ids_BT, np.int32),
        positions_BT=np.asarray(positions_BT, np.int32),
        row_B=np.arange(first_row, first_row + len(canvas_BT), dtype=np.int32),
        mask_id=np.int32(mask_id),
        eos_id=np.int32(-1 if eos_id is None else eos_id),
        steps_per_block=np.int32(steps // num_blocks),
        temperature=np.float32(temperature),
        cfg_scale=np.float32(cfg_scale),
        num_ids=np.int32(np.iinfo(np.int32).max if num_ids is None else num_ids),
    )
    sharding = _sharding_beside(logits_fn)
    canvas_BT, step, key, fixed = jax.device_put(
        (np.asarray(canvas_BT, np.int32), np.int32(0), key, _Fixed(**host)), sharding
    )
    mesh_sharding = sharding if isinstance(sharding, NamedSharding) else None
    in_flight: deque[Array] = deque()
    for number in range(1, steps + 1):
        # never an abstract mesh: its devices hold the parameters
        with jax.set_mesh(mesh_sharding.mesh) if mesh_sharding else nullcontext():  # type: ignore[arg-type]
            canvas_BT, is_new_BT, step, is_complete = _denoise_step(
                logits_fn,
                canvas_BT,
                step,
                key,
                fixed,
                gen_length=gen_length,
                block_length=block_length,
                rule=rule,
                is_stochastic=temperature > 0,
                is_guided=cfg_scale > 0,
                sharding=mesh_sharding,
            )
        in_flight.append(is_complete)
        if len(in_flight) > MAX_STEPS_IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
        block = -(-number * num_blocks // steps)
        yield DenoiseStep(canvas_BT, is_new_BT, number, steps, block, num_blocks)
        # Reading a value waits for the device, so it is done once per block, and only if it can end
        # the loop.
        if (
            eos_id is not None
            and number % (steps // num_blocks) == 0
            and jax.device_get(is_complete)
        ):
            return


def generate(logits_fn: Callable, canvas_BT: Any, key: Array, **settings: Any) -> jax.Array:
    """Returns the canvas after the last step; takes exactly what `denoise` takes."""
    for state in denoise(logits_fn, canvas_BT, key, **settings):
        canvas_BT = state.canvas_BT
    return canvas_BT
