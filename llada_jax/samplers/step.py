"""One block of the reverse process, compiled: passes until nothing of the block is hidden."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.rng import keys_for_rows
from llada_jax.samplers.choice import pick_tokens, without_ids
from llada_jax.samplers.commit import CRITERIA, SCHEDULE, count_kept
from llada_jax.samplers.network import (
    Network,
    Rows,
    checked,
    empty_cache,
    guided,
    with_unprompted,
)
from llada_jax.samplers.remasking import CommitRule, confidences, entropies, low_confidence
from llada_jax.samplers.revise import (
    LOOP,
    NONE,
    WINO,
    loop_count,
    most_drafted,
    taken_back_by_chance,
    taken_back_by_shadow,
)


class BlockProgram(NamedTuple):
    """What is known when the step of a block is compiled; each different value is compiled once."""

    gen_length: int
    block_length: int
    rule: CommitRule
    criterion: str  # "schedule" or a key of CRITERIA
    reviser: str  # "none" or a key of llada_jax.samplers.revise.REVISERS
    eos: str  # a key of llada_jax.samplers.settings.EOS
    is_bounded: bool  # whether the network sees only `lookahead` columns behind the block
    width: int  # columns of the canvas that go through the network, from the first one
    is_stochastic: bool
    is_filtered: bool
    is_guided: bool
    window: int  # columns that a pass with a cache computes; 0: there is no cache
    is_cache_kept: bool  # whether the cache is handed out, for the next step of the block
    with_confidence: bool  # whether the probabilities of revealed tokens are handed out
    sharding: jax.sharding.Sharding | None


class Fixed(NamedTuple):
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
    lookahead: jax.Array
    refresh: jax.Array  # steps between passes that fill the cache; 0: the first of a block alone
    amount: jax.Array  # of the commit criterion
    revise_amount: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    cfg_scale: jax.Array
    num_ids: jax.Array


class State(NamedTuple):
    """What a step changes."""

    canvas_BT: jax.Array
    step_in_block: jax.Array
    num_steps_B: jax.Array
    num_drafted_B: jax.Array  # int32: tokens that the last step of this block has kept
    confidence_BT: Any  # float32, what tokens were revealed with; () unless the program asks for it


def _is_among(tokens_BT: Array, ids_n: Array) -> Array:
    return jnp.any(tokens_BT[..., None] == ids_n, axis=-1)


def _fill_after_eos(canvas_BT: Array, is_generated_BT: Array, fixed: Fixed) -> Array:
    """Ends a row at its first generated end: everything it generates after that is EOS."""
    is_eos_BT = _is_among(canvas_BT, fixed.eos_ids_n) & is_generated_BT
    is_after_BT = (jnp.cumsum(is_eos_BT, axis=1) - is_eos_BT) > 0
    filled_BT = jnp.where(is_after_BT & is_generated_BT, fixed.fill_id, canvas_BT)
    return jnp.where(fixed.fill_id >= 0, filled_BT, canvas_BT)


def _rows(state: State, fixed: Fixed, program: BlockProgram) -> Rows:
    """Returns what of the canvas goes through the network, with guidance twice."""
    everything = (state.canvas_BT, fixed.segment_ids_BT, fixed.positions_BT, fixed.is_fixed_BT)
    *rows, is_fixed_BT = (array[:, : program.width] for array in everything)
    if program.is_guided:
        return with_unprompted(Rows(*rows), is_fixed_BT, fixed.mask_id)
    return Rows(*rows)


def _fills_cache(state: State, fixed: Fixed) -> Array:
    """Whether the next step computes all columns, and with them the cache."""
    is_due = state.step_in_block % jnp.maximum(fixed.refresh, 1) == 0
    return jnp.where(fixed.refresh > 0, is_due, state.step_in_block == 0)


def _block_logits(
    network: Network,
    state: State,
    cache: Any,
    fixed: Fixed,
    start: Array,
    program: BlockProgram,
    *,
    reads_cache: bool,
) -> tuple[Array, Array | None, Any]:
    """Returns the logits of the current block, float32 [B, block_length, V], those of its shadow
    where one verifies, and the cache, which was read or is filled.

    The whole canvas goes through the network and the current block through its head. Logits of the
    whole canvas would be the largest array by far, and thrown away: at 16 rows of 768 tokens and a
    vocabulary of 126,464 they take 5.8 GiB.
    """
    rows = _rows(state, fixed, program)
    # What lies further behind is not there yet.
    if program.is_bounded:
        is_there_T = jnp.arange(program.width) < start + program.block_length + fixed.lookahead
        rows = rows._replace(segment_ids_BT=jnp.where(is_there_T, rows.segment_ids_BT, 0))
    where: dict = {"start": start, "length": program.block_length}
    shadow_BTV = None
    if program.reviser == WINO:
        logits_BTV, shadow_BTV = network.shadow_fn(*rows, fixed.mask_id, **where)
    elif program.window and reads_cache:
        tokens_BW, positions_BW = (
            jax.lax.dynamic_slice_in_dim(array, start, program.window, axis=1)
            for array in (rows.tokens_BT, rows.positions_BT)
        )
        logits_BTV, cache = network.cached_fn(
            tokens_BW, rows.segment_ids_BT, positions_BW, cache, **where
        )
    elif program.window:
        logits_BTV, cache = network.cached_fn(*rows, None, **where)
    else:
        logits_BTV = network.logits_fn(*rows, **where)
    num_rows = rows.tokens_BT.shape[0]

    def ready(logits_BTV: Array) -> Array:
        logits_BTV = checked(logits_BTV, num_rows=num_rows, length=program.block_length)
        if program.is_guided:
            logits_BTV = guided(logits_BTV, fixed.cfg_scale)
        logits_BTV = without_ids(logits_BTV, fixed.suppress_n)
        # In a model with turns, their end still ends a text.
        if program.eos == "never":
            logits_BTV = without_ids(logits_BTV, fixed.eos_ids_n[:1])
        return logits_BTV

    return ready(logits_BTV), None if shadow_BTV is None else ready(shadow_BTV), cache


class _Block(NamedTuple):
    """The current block as a step finds it: arrays [B, block_length]."""

    tokens_BT: Array
    is_hidden_BT: Array
    is_kept_BT: Array  # generated by an earlier step


def _orders_and_counts(
    program: BlockProgram,
    fixed: Fixed,
    state: State,
    block: _Block,
    logits_BTV: Array,
    choices_BT: Array,
    keys_B: Array,
) -> tuple[Array, Array]:
    """Returns what sorts the hidden positions of the block, the greatest first, and how many of
    them a step keeps for good, int32 [B].
    """
    order_BT = confidences(program.rule, logits_BTV, choices_BT, keys_B)
    is_last_BT = jnp.zeros_like(block.is_hidden_BT)
    if program.eos == "last":
        is_last_BT = _is_among(choices_BT, fixed.eos_ids_n)
    order_BT = jnp.where(is_last_BT, jnp.finfo(jnp.float32).min, order_BT)
    # ceil(hidden / steps left) is the published count: hidden // steps, and one more in each of the
    # first hidden % steps steps. It is counted from what is still hidden, so a row with given
    # tokens inside the block, or one that is ahead of the schedule, reveals fewer per step.
    num_hidden_B = jnp.sum(block.is_hidden_BT, axis=1)
    count_B = -(-num_hidden_B // (fixed.steps_per_block - state.step_in_block))
    if program.reviser == LOOP:
        total_B = num_hidden_B + jnp.sum(block.is_kept_BT, axis=1)
        count_B = loop_count(num_hidden_B, total_B, state.step_in_block, fixed.steps_per_block)
    if program.criterion != SCHEDULE:
        probability_BT = low_confidence(logits_BTV, choices_BT, keys_B)
        is_by_entropy = CRITERIA[program.criterion].is_by_entropy
        entropy_BT = entropies(logits_BTV) if is_by_entropy else jnp.zeros_like(probability_BT)
        sure_B = count_kept(
            program.criterion,
            probability_BT,
            entropy_BT,
            block.is_hidden_BT & ~is_last_BT,
            fixed.amount,
        )
        if program.reviser == WINO:
            sure_B = jnp.minimum(sure_B, most_drafted(num_hidden_B))
        count_B = jnp.maximum(count_B, sure_B)
    return order_BT, count_B


def _next_tokens(
    program: BlockProgram,
    fixed: Fixed,
    state: State,
    block: _Block,
    logits_BTV: Array,
    shadow_BTV: Array | None,
    choices_BT: Array,
    keys_B: Array,
) -> tuple[Array, Array]:
    """Returns the block after a step, int32 [B, T], and how many of its tokens were revealed."""
    order_BT, count_B = _orders_and_counts(
        program, fixed, state, block, logits_BTV, choices_BT, keys_B
    )
    num_hidden_B = jnp.sum(block.is_hidden_BT, axis=1)
    is_taken_back_BT = jnp.zeros_like(block.is_hidden_BT)
    if shadow_BTV is not None:
        kept_probability_BT = low_confidence(shadow_BTV, block.tokens_BT, keys_B)
        is_taken_back_BT = taken_back_by_shadow(
            fixed.revise_amount,
            block.is_kept_BT,
            kept_probability_BT,
            count_B,
            state.num_drafted_B,
            is_last=state.step_in_block >= fixed.steps_per_block - 1,
        )
    elif program.reviser != NONE:
        is_taken_back_BT = taken_back_by_chance(
            program.reviser,
            fixed.revise_amount,
            block.is_kept_BT,
            num_hidden_B - count_B,
            # A stream of its own: with remasking="random" the order comes from `keys_B`.
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, 1),
            step=state.step_in_block,
            steps=fixed.steps_per_block,
        )
        count_B = count_B + jnp.sum(is_taken_back_BT, axis=1)
    # Ranks, and not top_k, whose k would have to be static.
    rank_BT = _rank(jnp.where(block.is_hidden_BT, order_BT, -jnp.inf))
    is_revealed_BT = block.is_hidden_BT & (rank_BT < count_B[:, None])
    tokens_BT = jnp.where(is_revealed_BT, choices_BT, block.tokens_BT)
    return jnp.where(is_taken_back_BT, fixed.mask_id, tokens_BT), count_B


def _rank(score_BT: Array) -> Array:
    """Returns the place of each position in its row, 0 for the greatest; ties go to the left."""
    return jnp.argsort(jnp.argsort(-score_BT, axis=1, stable=True), axis=1)


# The cache is updated in place: next to the parameters it may be the largest array by far.
@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def denoise_block(
    network: Network,
    state: State,
    cache: Any,
    block: Array,
    max_steps: Array,
    key: Array,
    fixed: Fixed,
    *,
    program: BlockProgram,
) -> tuple[State, Any, Array, Array, Array, Array]:
    """Runs steps until the current block is done, but no more than `max_steps` of them.

    Static arguments decide what is compiled. What only changes numbers is traced: the block and its
    steps, the schedule, ids, temperature and guidance strength.

    Args:
        cache: what `cached_fn` returns, of any values at the start of a block, and gone afterwards;
            () where there is none, or at the start of a block.

    Returns:
        the state, the cache (() unless it is kept), is_new_BT, the number of the next block, the
        steps run, and which rows are complete, bool [B].
    """
    # Made here, so that the partitioner splits it like the keys and values that fill it. A cache
    # from outside is whole on every device, or split by axes that only the network knows.
    if program.window and not jax.tree.leaves(cache):
        rows = _rows(state, fixed, program)
        cache = empty_cache(network.cached_fn, rows, length=program.block_length)
    # Only the current block is read and written, so logits, noise and softmax cover it alone.
    # `start` is traced: all blocks share one program.
    T = state.canvas_BT.shape[1]
    start = T - program.gen_length + block * program.block_length
    is_generated_BT = ~fixed.is_fixed_BT & (jnp.arange(T) >= T - program.gen_length)
    is_masked_before_BT = is_generated_BT & (state.canvas_BT == fixed.mask_id)

    def in_block(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, program.block_length, axis=1)

    def hidden(state: State) -> Array:
        return in_block(is_generated_BT) & (in_block(state.canvas_BT) == fixed.mask_id)

    def step(
        carried: tuple[State, Any, Array], *, reads_cache: bool = False
    ) -> tuple[State, Any, Array]:
        state, cache, num_done = carried
        is_hidden_BT = hidden(state)
        is_kept_BT = in_block(is_generated_BT) & ~is_hidden_BT
        current = _Block(in_block(state.canvas_BT), is_hidden_BT, is_kept_BT)

        # 1. The logits of the current block.
        logits_BTV, shadow_BTV, cache = _block_logits(
            network, state, cache, fixed, start, program, reads_cache=reads_cache
        )

        # 2. Keys fold (step, row). The step is counted within the schedule and not over the passes
        # of the batch: neither the other rows nor the padding change what a row draws.
        number = block * fixed.steps_per_block + state.step_in_block
        keys_B = keys_for_rows(jax.random.fold_in(key, number), fixed.row_B)
        token_keys_B, remasking_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)

        # 3. A proposal for every position, those that are kept, and those that are taken back.
        choices_BT = pick_tokens(
            logits_BTV,
            token_keys_B,
            in_block(fixed.positions_BT),
            mask_id=fixed.mask_id,
            num_ids=fixed.num_ids,
            temperature=fixed.temperature,
            top_k=fixed.top_k,
            top_p=fixed.top_p,
            is_stochastic=program.is_stochastic,
            is_filtered=program.is_filtered,
        )
        tokens_BT, num_drafted_B = _next_tokens(
            program, fixed, state, current, logits_BTV, shadow_BTV, choices_BT, remasking_keys_B
        )
        confidence_BT = state.confidence_BT
        if program.with_confidence:
            probability_BT = low_confidence(logits_BTV, choices_BT, remasking_keys_B)
            is_revealed_BT = is_hidden_BT & (tokens_BT != fixed.mask_id)
            confidence_BT = jax.lax.dynamic_update_slice_in_dim(
                confidence_BT,
                jnp.where(is_revealed_BT, probability_BT, in_block(confidence_BT)),
                start,
                axis=1,
            )
        state = State(
            jax.lax.dynamic_update_slice_in_dim(state.canvas_BT, tokens_BT, start, axis=1),
            state.step_in_block + 1,
            state.num_steps_B + jnp.any(is_hidden_BT, axis=1),
            num_drafted_B,
            confidence_BT,
        )
        return state, cache, num_done + 1

    def is_unfinished(carried: tuple[State, Any, Array]) -> Array:
        state, _, num_done = carried
        return jnp.any(hidden(state)) & (num_done < max_steps)

    def steps_with_cache(carried: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
        """Fills the cache where that is due, and reads it until it is due again.

        Two loops, and no choice within one: a choice would copy the cache in every step, which is
        most of what a step with a cache moves.
        """
        fills = lambda carried: _fills_cache(carried[0], fixed)  # noqa: E731
        carried = jax.lax.while_loop(lambda c: is_unfinished(c) & fills(c), step, carried)
        return jax.lax.while_loop(
            lambda c: is_unfinished(c) & ~fills(c), partial(step, reads_cache=True), carried
        )

    state, cache, num_done = jax.lax.while_loop(
        is_unfinished, steps_with_cache if program.window else step, (state, cache, jnp.int32(0))
    )

    # A row that has met EOS in a finished block is complete. Not before its block is finished:
    # positions in front of the EOS are still hidden until then, and may reveal an earlier one.
    is_done = ~jnp.any(hidden(state))
    ended_BT = _fill_after_eos(state.canvas_BT, is_generated_BT, fixed)
    canvas_BT = jnp.where(is_done, ended_BT, state.canvas_BT)
    is_left_BT = is_generated_BT & (canvas_BT == fixed.mask_id)
    confidence_BT = state.confidence_BT
    # What is filled in was never proposed.
    if program.with_confidence:
        is_filled_BT = canvas_BT != state.canvas_BT
        confidence_BT = jnp.where(is_filled_BT, jnp.nan, confidence_BT)
    state, *others = (
        State(
            canvas_BT,
            jnp.where(is_done, 0, state.step_in_block),
            state.num_steps_B,
            jnp.where(is_done, 0, state.num_drafted_B),
            confidence_BT,
        ),
        is_masked_before_BT & ~is_left_BT,
        block + is_done,
        num_done,
        ~jnp.any(is_left_BT, axis=1),
    )
    # Placed like its input, or the second call would be compiled again for another placement. A
    # cache that is kept stays where it was computed.
    if program.sharding is not None:
        state, *others = jax.lax.with_sharding_constraint((state, *others), program.sharding)
    return state, cache if program.is_cache_kept else (), *others


@partial(jax.jit, static_argnames="program")
def empty_cache_of(network: Network, state: State, fixed: Fixed, *, program: BlockProgram) -> Any:
    rows = _rows(state, fixed, program)
    return empty_cache(network.cached_fn, rows, length=program.block_length)
