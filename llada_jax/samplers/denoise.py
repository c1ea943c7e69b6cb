"""The reverse process: a canvas of masks becomes tokens, some in every step, block after block.

This is the sampler of LLaDA (arXiv 2502.09992, algorithms 4 and 5, section 2.4 and appendix B.4).
With one block as long as the generation it is pure diffusion; with more blocks it is
semi-autoregressive: later blocks are seen as masks while an earlier one is denoised, or not seen at
all where blocks are appended. What was revealed is never revised.

The network is a function that is asked for the logits of a window of columns alone, see
llada_jax.samplers.network. It sees the whole canvas, and nothing is ever computed at the size of
canvas times vocabulary, because only the current block is read.

No row sees another: what it draws and keeps, when it ends, and how many passes it is said to have
taken are what they would be if it were sampled alone.

Three deliberate differences from the published code, none of which changes what it produces on
ordinary input:
- `mask_id` is never chosen. There, a position that draws the mask token silently stays hidden, its
  turn is lost, and masks can remain in the result. Only the choice is restricted: confidences still
  come from the full softmax.
- The prompt is what `is_fixed_BT` says, not what differs from `mask_id`, so a prompt may contain
  the mask token.
- Confidences are float32 whatever the model computes in.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from llada_jax.rng import keys_for_rows
from llada_jax.samplers.choice import pick_tokens, without_ids
from llada_jax.samplers.commit import CRITERIA, SCHEDULE, count_kept, parse_commit
from llada_jax.samplers.network import (
    CacheFns,
    Rows,
    as_partial,
    checked,
    empty_cache,
    guided,
    sharding_beside,
    with_unprompted,
)
from llada_jax.samplers.remasking import (
    CommitRule,
    commit_rule,
    confidences,
    entropies,
    low_confidence,
)
from llada_jax.samplers.settings import check_options, check_schedule


class DenoiseStep(NamedTuple):
    """What has been done so far. Arrays stay on the device until they are read."""

    canvas_BT: jax.Array  # int32
    is_new_BT: jax.Array  # bool: revealed (or filled with EOS) since the state before this one
    step: int  # passes of the network so far, 1 ... num_steps
    num_steps: int  # the most that there can be
    block: int  # 1 ... num_blocks
    num_blocks: int
    num_steps_B: jax.Array  # int32: the passes that each row needed so far


class _Plan(NamedTuple):
    """What decides which program is compiled; each different plan is compiled once."""

    gen_length: int
    block_length: int
    rule: CommitRule
    criterion: str  # "schedule" or a key of CRITERIA
    eos: str  # a key of llada_jax.samplers.settings.EOS
    is_appending: bool
    is_stochastic: bool
    is_filtered: bool
    is_guided: bool
    window: int  # columns that a pass with a cache computes; 0: there is no cache
    sharding: jax.sharding.Sharding | None


class _Fixed(NamedTuple):
    """Arrays and numbers that no step changes. All traced: another value of any of them reuses the
    compiled program.
    """

    is_fixed_BT: jax.Array
    segment_ids_BT: jax.Array
    positions_BT: jax.Array
    row_B: jax.Array  # number of each row in the whole request, whatever batch it is in
    mask_id: jax.Array
    fill_id: jax.Array  # what fills a row that has ended; -1 when nothing ends a row
    eos_ids_n: jax.Array
    suppress_n: jax.Array
    steps_per_block: jax.Array
    refresh: jax.Array  # steps between passes that fill the cache; 0: the first of a block alone
    amount: jax.Array  # of the commit criterion
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    cfg_scale: jax.Array
    num_ids: jax.Array


class _State(NamedTuple):
    """What a step changes."""

    canvas_BT: jax.Array
    step_in_block: jax.Array
    num_steps_B: jax.Array
    cache: Any  # () without one


def _is_among(tokens_BT: Array, ids_n: Array) -> Array:
    return jnp.any(tokens_BT[..., None] == ids_n, axis=-1)


def _fill_after_eos(canvas_BT: Array, is_generated_BT: Array, fixed: _Fixed) -> Array:
    """Ends a row at its first generated end: everything it generates after that is EOS."""
    is_eos_BT = _is_among(canvas_BT, fixed.eos_ids_n) & is_generated_BT
    is_after_BT = (jnp.cumsum(is_eos_BT, axis=1) - is_eos_BT) > 0
    filled_BT = jnp.where(is_after_BT & is_generated_BT, fixed.fill_id, canvas_BT)
    return jnp.where(fixed.fill_id >= 0, filled_BT, canvas_BT)


def _block_logits(
    network: tuple, state: _State, fixed: _Fixed, start: Array, plan: _Plan
) -> tuple[Array, Any]:
    """Returns the logits of the current block, float32 [B, block_length, V], and the cache.

    The whole canvas goes through the network and the current block through its head. Logits of the
    whole canvas would be the largest array by far, and thrown away: at 16 rows of 768 tokens and a
    vocabulary of 126,464 they take 5.8 GiB.
    """
    logits_fn, cache_fns = network
    segment_ids_BT = fixed.segment_ids_BT
    if plan.is_appending:  # later blocks are not there yet
        is_there_T = jnp.arange(segment_ids_BT.shape[1]) < start + plan.block_length
        segment_ids_BT = jnp.where(is_there_T, segment_ids_BT, 0)
    rows = Rows(state.canvas_BT, segment_ids_BT, fixed.positions_BT)
    if plan.is_guided:
        rows = with_unprompted(rows, fixed.is_fixed_BT, fixed.mask_id)
    where: dict = {"start": start, "length": plan.block_length}
    if plan.window:

        def read() -> tuple[Array, Any]:
            tokens_BW, positions_BW = (
                jax.lax.dynamic_slice_in_dim(array, start, plan.window, axis=1)
                for array in (rows.tokens_BT, rows.positions_BT)
            )
            return cache_fns.read_fn(
                state.cache, tokens_BW, positions_BW, rows.segment_ids_BT, **where
            )

        is_due = state.step_in_block % jnp.maximum(fixed.refresh, 1) == 0
        is_due = jnp.where(fixed.refresh > 0, is_due, state.step_in_block == 0)
        logits_BTV, cache = jax.lax.cond(is_due, lambda: cache_fns.fill_fn(*rows, **where), read)
    else:
        logits_BTV, cache = logits_fn(*rows, **where), ()
    num_rows = rows.tokens_BT.shape[0]
    logits_BTV = checked(logits_BTV, num_rows=num_rows, length=plan.block_length)
    return guided(logits_BTV, fixed.cfg_scale) if plan.is_guided else logits_BTV, cache


def _rank(score_BT: Array) -> Array:
    """Returns the place of each position in its row, 0 for the greatest; ties go to the left."""
    return jnp.argsort(jnp.argsort(-score_BT, axis=1, stable=True), axis=1)


def _revealed(
    plan: _Plan,
    fixed: _Fixed,
    logits_BTV: Array,
    choices_BT: Array,
    is_hidden_BT: Array,
    keys_B: Array,
    steps_left: Array,
) -> Array:
    """Returns which hidden positions of the block keep their proposals, bool [B, T]."""
    order_BT = confidences(plan.rule, logits_BTV, choices_BT, keys_B)
    is_last_BT = jnp.zeros_like(is_hidden_BT)
    if plan.eos == "last":
        is_last_BT = _is_among(choices_BT, fixed.eos_ids_n)
    order_BT = jnp.where(is_last_BT, jnp.finfo(jnp.float32).min, order_BT)
    # ceil(hidden / steps left) is the published count: hidden // steps, and one more in each of the
    # first hidden % steps steps. It is counted from what is still hidden, so a row with given
    # tokens inside the block, or one that is ahead of the schedule, reveals fewer per step.
    count_B = -(-jnp.sum(is_hidden_BT, axis=1) // steps_left)
    if plan.criterion != SCHEDULE:
        probability_BT = low_confidence(logits_BTV, choices_BT, keys_B)
        is_by_entropy = CRITERIA[plan.criterion].is_by_entropy
        entropy_BT = entropies(logits_BTV) if is_by_entropy else jnp.zeros_like(probability_BT)
        sure_B = count_kept(
            plan.criterion,
            probability_BT,
            entropy_BT,
            is_hidden_BT & ~is_last_BT,
            fixed.amount,
        )
        count_B = jnp.maximum(count_B, sure_B)
    # Ranks, and not top_k, whose k would have to be static.
    rank_BT = _rank(jnp.where(is_hidden_BT, order_BT, -jnp.inf))
    return is_hidden_BT & (rank_BT < count_B[:, None])


@partial(jax.jit, static_argnames="plan")
def _denoise_block(
    network: tuple,
    state: _State,
    block: Array,
    max_steps: Array,
    key: Array,
    fixed: _Fixed,
    *,
    plan: _Plan,
) -> tuple[_State, Array, Array, Array, Array]:
    """Runs steps until the current block is done, but no more than `max_steps` of them.

    Static arguments decide what is compiled. What only changes numbers is traced: the block and its
    steps, the schedule, ids, temperature and guidance strength.

    Returns:
        the state, is_new_BT, the number of the next block, the steps run, and whether every row is
        complete.
    """
    # Only the current block is read and written, so logits, noise and softmax cover it alone.
    # `start` is traced: all blocks share one program.
    T = state.canvas_BT.shape[1]
    start = T - plan.gen_length + block * plan.block_length
    is_generated_BT = ~fixed.is_fixed_BT & (jnp.arange(T) >= T - plan.gen_length)
    is_masked_before_BT = is_generated_BT & (state.canvas_BT == fixed.mask_id)

    def in_block(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, plan.block_length, axis=1)

    def hidden(state: _State) -> Array:
        return in_block(is_generated_BT) & (in_block(state.canvas_BT) == fixed.mask_id)

    def step(state_and_count: tuple[_State, Array]) -> tuple[_State, Array]:
        state, num_done = state_and_count
        is_hidden_BT = hidden(state)

        # 1. The logits of the current block.
        logits_BTV, cache = _block_logits(network, state, fixed, start, plan)
        logits_BTV = without_ids(logits_BTV, fixed.suppress_n)
        if plan.eos == "never":  # of a model with turns, their end still ends a text
            logits_BTV = without_ids(logits_BTV, fixed.eos_ids_n[:1])

        # 2. Keys fold (step, row). The step is counted within the schedule and not over the passes
        # of the batch: neither the other rows nor the padding change what a row draws.
        number = block * fixed.steps_per_block + state.step_in_block
        keys_B = keys_for_rows(jax.random.fold_in(key, number), fixed.row_B)
        token_keys_B, remasking_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)

        # 3. A proposal for every position, and those that are kept.
        choices_BT = pick_tokens(
            logits_BTV,
            token_keys_B,
            in_block(fixed.positions_BT),
            mask_id=fixed.mask_id,
            num_ids=fixed.num_ids,
            temperature=fixed.temperature,
            top_k=fixed.top_k,
            top_p=fixed.top_p,
            is_stochastic=plan.is_stochastic,
            is_filtered=plan.is_filtered,
        )
        is_revealed_BT = _revealed(
            plan,
            fixed,
            logits_BTV,
            choices_BT,
            is_hidden_BT,
            remasking_keys_B,
            fixed.steps_per_block - state.step_in_block,
        )
        tokens_BT = jnp.where(is_revealed_BT, choices_BT, in_block(state.canvas_BT))
        state = _State(
            jax.lax.dynamic_update_slice_in_dim(state.canvas_BT, tokens_BT, start, axis=1),
            state.step_in_block + 1,
            state.num_steps_B + jnp.any(is_hidden_BT, axis=1),
            cache,
        )
        return state, num_done + 1

    def is_unfinished(state_and_count: tuple[_State, Array]) -> Array:
        state, num_done = state_and_count
        return jnp.any(hidden(state)) & (num_done < max_steps)

    state, num_done = jax.lax.while_loop(is_unfinished, step, (state, jnp.int32(0)))

    # A row that has met EOS in a finished block is complete. Not before its block is finished:
    # positions in front of the EOS are still hidden until then, and may reveal an earlier one.
    is_done = ~jnp.any(hidden(state))
    ended_BT = _fill_after_eos(state.canvas_BT, is_generated_BT, fixed)
    canvas_BT = jnp.where(is_done, ended_BT, state.canvas_BT)
    is_left_BT = is_generated_BT & (canvas_BT == fixed.mask_id)
    result = (
        _State(
            canvas_BT,
            jnp.where(is_done, 0, state.step_in_block),
            state.num_steps_B,
            # Whatever comes next fills it again.
            state.cache,
        ),
        is_masked_before_BT & ~is_left_BT,
        block + is_done,
        num_done,
        ~jnp.any(is_left_BT),
    )
    if plan.sharding is None:
        return result
    # Placed like its input, or the second call would be compiled again for another placement. The
    # cache stays where it was computed.
    placed = jax.lax.with_sharding_constraint(
        (result[0]._replace(cache=()), *result[1:]), plan.sharding
    )
    return (placed[0]._replace(cache=result[0].cache), *placed[1:])


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
    commit: str = SCHEDULE,
    append: bool = False,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_scale: float = 0.0,
    eos_id: int | Sequence[int] | None = None,
    eos: str = "free",
    stop_at_eos: bool = True,
    suppress: Sequence[int] = (),
    cache: str = "none",
    refresh: int = 0,
    cache_fns: CacheFns | None = None,
    first_row: int = 0,
    num_ids: int | None = None,
    each_step: bool = True,
) -> Iterator[DenoiseStep]:
    """Runs the reverse process and yields after every step, or after every block.

    One program is compiled for each (batch, T, gen_length, block_length, remasking, commit, append,
    eos, cache, number of ids in eos_id and suppress, and whether temperature, filter and guidance
    are on); steps, blocks, prompts, ids and the numbers of the options reuse it.

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
            divides steps. With a commit criterion `steps` is the most that there can be.
        remasking: which proposals come first: a name in llada_jax.samplers.remasking.REMASKING, or
            "module:function" for an own rule.
        commit: how many of them a step keeps, see llada_jax.samplers.commit.
        append: later blocks are not there, instead of there as masks, while a block is denoised.
        temperature: 0 takes the most likely token, 1 samples the model's distribution.
        top_k, top_p: see llada_jax.samplers.choice.keep_likely; 0 and 1 keep every token.
        cfg_scale: guidance strength w; 0 means none, otherwise the network runs on twice the batch.
        eos_id: what ends a text: EOS, or EOS and further ids, such as that of the end of a turn.
            None: nothing.
        eos: "free"; "never": the logits of EOS (the first id) are off; "last": proposals of any of
            the ids are kept after all others.
        stop_at_eos: after a block that contains one of the ids, the rest of the row is filled with
            EOS, and when every row has ended no further step runs. False, as published, generates
            all gen_length tokens.
        suppress: ids whose logits are off.
        cache, refresh, cache_fns: "prefix" keeps keys and values of all that stands before the
            current block, "dual" also of what stands behind it, and computes them again in the
            first of every `refresh` steps of a block (0: once per block). cache_fns computes them.
        num_ids: only ids below this are generated: the embedding may have more rows than the
            tokenizer has ids. None (as published): every row of the embedding.
        first_row: number of the first row in the whole request, when the request is cut into
            batches.
        each_step: False yields after every block: the host is not asked in between.

    Raises:
        UserError: the schedule does not divide evenly, an option is out of range or unknown, or an
            own rule or logits_fn returns another shape or dtype than it must (found before the
            first step).
    """
    check_schedule(
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        temperature=temperature,
        cfg_scale=cfg_scale,
    )
    eos_ids = [eos_id] if isinstance(eos_id, (int, np.integer)) else list(eos_id or ())
    check_options(
        remasking=remasking,
        commit=commit,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos=eos,
        has_eos=bool(eos_ids),
        suppress=suppress,
        num_ids=num_ids,
        cache=cache,
        refresh=refresh,
    )
    criterion = parse_commit(commit)
    is_by_entropy = criterion.name != SCHEDULE and CRITERIA[criterion.name].is_by_entropy
    network = (as_partial(logits_fn), None if cache == "none" else cache_fns)
    num_blocks = gen_length // block_length
    # numpy values here, which device_put makes the arrays that the fields promise
    host: dict[str, Any] = dict(
        is_fixed_BT=np.asarray(is_fixed_BT, bool),
        segment_ids_BT=np.asarray(segment_ids_BT, np.int32),
        positions_BT=np.asarray(positions_BT, np.int32),
        row_B=np.arange(first_row, first_row + len(canvas_BT), dtype=np.int32),
        mask_id=np.int32(mask_id),
        fill_id=np.int32(eos_ids[0] if eos_ids and stop_at_eos else -1),
        # No token has the id -1; one shape with and without an EOS shares the compiled program.
        eos_ids_n=np.asarray(eos_ids or [-1], np.int32),
        suppress_n=np.asarray(suppress, np.int32),
        steps_per_block=np.int32(steps // num_blocks),
        refresh=np.int32(refresh),
        amount=np.float32(criterion.amount),
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        cfg_scale=np.float32(cfg_scale),
        num_ids=np.int32(np.iinfo(np.int32).max if num_ids is None else num_ids),
    )
    empty: dict[str, Any] = dict(
        canvas_BT=np.asarray(canvas_BT, np.int32),
        step_in_block=np.int32(0),
        num_steps_B=np.zeros(len(canvas_BT), np.int32),
        cache=(),
    )
    state = _State(**empty)
    sharding = sharding_beside(network)
    state, number, key, fixed = jax.device_put((state, np.int32(0), key, _Fixed(**host)), sharding)
    mesh_sharding = sharding if isinstance(sharding, NamedSharding) else None
    plan = _Plan(
        gen_length=gen_length,
        block_length=block_length,
        rule=commit_rule("entropy" if is_by_entropy else remasking),
        criterion=criterion.name,
        eos=eos,
        is_appending=append,
        is_stochastic=temperature > 0,
        is_filtered=top_k > 0 or top_p < 1,
        is_guided=cfg_scale > 0,
        window=0,
        sharding=mesh_sharding,
    )
    max_steps = 1 if each_step else steps
    step = block = 0
    while True:
        # never an abstract mesh: its devices hold the parameters
        with jax.set_mesh(mesh_sharding.mesh) if mesh_sharding else nullcontext():  # type: ignore[arg-type]
            if cache != "none":
                # What stands behind the block is computed with it unless its cache is kept too. An
                # appended block has nothing behind it.
                is_whole = cache == "prefix" and not append
                width = gen_length - block * block_length if is_whole else block_length
                plan = plan._replace(window=width)
                if not step:
                    state = state._replace(cache=_empty_cache(network, state, fixed, plan=plan))
            state, is_new_BT, number, num_done, is_complete = _denoise_block(
                network, state, number, np.int32(max_steps), key, fixed, plan=plan
            )
        # Waits for the device: dozens of dispatched programs deadlock where several processes share
        # a mesh of CPU devices, because those that wait for their turn hold the threads on which
        # the collectives would meet.
        now = block
        block, num_done, is_over = (int(x) for x in jax.device_get((number, num_done, is_complete)))
        step += num_done
        if num_done:
            yield DenoiseStep(
                state.canvas_BT, is_new_BT, step, steps, now + 1, num_blocks, state.num_steps_B
            )
        if is_over:
            return


@partial(jax.jit, static_argnames="plan")
def _empty_cache(network: tuple, state: _State, fixed: _Fixed, *, plan: _Plan) -> Any:
    rows = Rows(state.canvas_BT, fixed.segment_ids_BT, fixed.positions_BT)
    if plan.is_guided:
        rows = with_unprompted(rows, fixed.is_fixed_BT, fixed.mask_id)
    return empty_cache(network[1].fill_fn, rows, length=plan.block_length)


def generate(logits_fn: Callable, canvas_BT: Any, key: Array, **settings: Any) -> jax.Array:
    """Returns the canvas after the last step; takes exactly what `denoise` takes."""
    for state in denoise(logits_fn, canvas_BT, key, each_step=False, **settings):
        canvas_BT = state.canvas_BT
    return canvas_BT
