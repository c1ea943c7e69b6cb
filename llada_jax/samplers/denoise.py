"""The reverse process: a canvas of masks becomes tokens, some in every step, block after block.

This is the sampler of LLaDA (arXiv 2502.09992, algorithms 4 and 5, section 2.4 and appendix B.4).
With one block as long as the generation it is pure diffusion; with more blocks it is
semi-autoregressive: later blocks are seen as masks while an earlier one is denoised, or not seen at
all where blocks are appended. What was revealed stays, unless `revise` names a rule that takes it
back.

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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from llada_jax.errors import UserError
from llada_jax.samplers.commit import CRITERIA, SCHEDULE, parse_commit
from llada_jax.samplers.network import (
    Network,
    as_partial,
    place_everywhere,
    sharding_beside,
)
from llada_jax.samplers.remasking import commit_rule
from llada_jax.samplers.revise import NONE, WINO, parse_revise
from llada_jax.samplers.settings import check_options, check_proposals, check_schedule
from llada_jax.samplers.step import BlockProgram, Fixed, State, denoise_block, empty_cache_of


class DenoiseStep(NamedTuple):
    """What has been done so far. Arrays stay on the device until they are read."""

    canvas_BT: jax.Array  # int32
    is_new_BT: jax.Array  # bool: revealed (or filled with EOS) since the state before this one
    step: int  # passes of the network so far, 1 ... num_steps
    num_steps: int  # the most that there can be
    block: int  # 1 ... num_blocks
    num_blocks: int
    num_steps_B: jax.Array  # int32: the passes that each row needed so far
    # float32, where it was asked for: the probability that each token had when it was revealed; NaN
    # for what was never proposed, such as the EOS that fills up a row
    confidence_BT: jax.Array | None = None


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
    revise: str = NONE,
    append: bool = False,
    lookahead: int | None = None,
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
    cached_fn: Callable | None = None,
    shadow_fn: Callable | None = None,
    row_B: Sequence[int] | None = None,
    num_ids: int | None = None,
    blocks: range | None = None,
    each_step: bool = True,
    with_confidence: bool = False,
) -> Iterator[DenoiseStep]:
    """Runs the reverse process and yields after every step, or after every block.

    One program is compiled for each (batch, T, gen_length, block_length, remasking, commit, revise,
    append, eos, cache, number of ids in eos_id and suppress, and whether temperature, filter and
    guidance are on); steps, blocks, prompts, ids and the numbers of the options reuse it.

    Args:
        logits_fn: (tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> logits [B, length,
            V] of the columns start ... start + length - 1; `start` is traced and `length` is an
            int. Pass `jax.tree_util.Partial(fn, params)` for a real model: its parameters are then
            arguments of the compiled step, not constants baked into it.
        canvas_BT: int32; `mask_id` where a token is to be generated. The last `gen_length` columns
            are generated.
        key: random key; row r at step s draws from fold(key, s, row_B[r]). At temperature 0 with
            low_confidence it changes nothing.
        is_fixed_BT: bool; padding and prompt (also given tokens inside the generation), never
            changed.
        segment_ids_BT, positions_BT: int32, handed to `logits_fn`; segment 0 is padding.
        gen_length, block_length, steps: block_length divides gen_length, the number of blocks
            divides steps. With a commit criterion `steps` is the most that there can be.
        remasking: which proposals come first: a name in llada_jax.samplers.remasking.REMASKING, or
            "module:function" for an own rule.
        commit: how many of them a step keeps, see llada_jax.samplers.commit.
        revise: which of them are masked again, see llada_jax.samplers.revise.
        append: later blocks are not there, instead of there as masks, while a block is denoised.
        lookahead: columns behind the current block that are there, as masks; None: all, and 0 is
            what `append` says. What is not there costs nothing but the rest of a quarter of the
            generation, to which the canvas is cut: at most four programs are compiled.
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
        cache, refresh, cached_fn: "prefix" keeps keys and values of all that stands before the
            current block, "dual" also of what stands behind it, and computes them again in the
            first of every `refresh` steps of a block (0: once per block). cached_fn computes them.
        shadow_fn: for revise="wino".
        num_ids: only ids below this are generated: the embedding may have more rows than the
            tokenizer has ids. None (as published): every row of the embedding.
        row_B: numbers of the rows in the whole request, when the request is cut into batches; None
            counts from 0.
        blocks: those to denoise, when the ones before are finished; None: all.
        each_step: False yields after every block: the host is not asked in between.
        with_confidence: whether the states have `confidence_BT`, which costs a softmax more.

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
        revise=revise,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos=eos,
        has_eos=bool(eos_ids),
        suppress=suppress,
        num_ids=num_ids,
        cache=cache,
        refresh=refresh,
        append=append,
        lookahead=lookahead,
    )
    never = eos_ids[:1] if eos == "never" else []
    check_proposals(suppress, also_off=[mask_id, *never], num_ids=num_ids)
    criterion = parse_commit(commit)
    is_by_entropy = criterion.name != SCHEDULE and CRITERIA[criterion.name].is_by_entropy
    reviser = parse_revise(revise)
    if reviser.name == WINO and shadow_fn is None:
        raise UserError(
            f"revise={revise} asks the network for the shadow of a block; hand in shadow_fn, see "
            "llada_jax.samplers.network, or use another rule that revises."
        )
    network = Network(
        as_partial(logits_fn),
        as_partial(cached_fn) if cache != "none" and cached_fn else None,
        as_partial(shadow_fn) if reviser.name == WINO and shadow_fn else None,
    )
    num_blocks = gen_length // block_length
    num_ahead = 0 if append else lookahead or 0
    # numpy values here, which device_put makes the arrays that the fields promise
    host: dict[str, Any] = dict(
        is_fixed_BT=np.asarray(is_fixed_BT, bool),
        segment_ids_BT=np.asarray(segment_ids_BT, np.int32),
        positions_BT=np.asarray(positions_BT, np.int32),
        row_B=np.asarray(range(len(canvas_BT)) if row_B is None else row_B, np.int32),
        mask_id=np.int32(mask_id),
        fill_id=np.int32(eos_ids[0] if eos_ids and stop_at_eos else -1),
        # No token has the id -1; one shape with and without an EOS shares the compiled program.
        eos_ids_n=np.asarray(eos_ids or [-1], np.int32),
        suppress_n=np.asarray(suppress, np.int32),
        steps_per_block=np.int32(steps // num_blocks),
        lookahead=np.int32(num_ahead),
        refresh=np.int32(refresh),
        amount=np.float32(criterion.amount),
        revise_amount=np.float32(reviser.amount),
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
        num_drafted_B=np.zeros(len(canvas_BT), np.int32),
        confidence_BT=np.full(np.shape(canvas_BT), np.nan, np.float32) if with_confidence else (),
    )
    state, kept = State(**empty), ()
    sharding = sharding_beside(network)
    blocks = range(num_blocks) if blocks is None else blocks
    state, number, key, fixed = place_everywhere(
        (state, np.int32(blocks.start), key, Fixed(**host)), sharding
    )
    mesh_sharding = sharding if isinstance(sharding, NamedSharding) else None
    is_one_device = sharding is None or sharding.num_devices == 1
    program = BlockProgram(
        gen_length=gen_length,
        block_length=block_length,
        rule=commit_rule("entropy" if is_by_entropy else remasking),
        criterion=criterion.name,
        reviser=reviser.name,
        eos=eos,
        is_bounded=append or lookahead is not None,
        width=fixed.segment_ids_BT.shape[1],
        is_stochastic=temperature > 0,
        is_filtered=top_k > 0 or top_p < 1,
        is_guided=cfg_scale > 0,
        window=0,
        is_cache_kept=each_step and cache != "none",
        with_confidence=with_confidence,
        sharding=mesh_sharding,
    )
    max_steps = 1 if each_step else steps
    block = blocks.start
    step = block * (steps // num_blocks)
    while True:
        # never an abstract mesh: its devices hold the parameters
        with jax.set_mesh(mesh_sharding.mesh) if mesh_sharding else nullcontext():  # type: ignore[arg-type]
            of_last = program.width
            program = _program_of_block(
                program, block, cache, width=len(canvas_BT[0]), lookahead=num_ahead
            )
            # Whatever it holds, the first step of a block fills it again.
            if program.width != of_last:
                kept = ()
            # The first step shares the program of the others, but not on a mesh, where this cache
            # would be whole on every device.
            if program.is_cache_kept and is_one_device and not jax.tree.leaves(kept):
                kept = empty_cache_of(network, state, fixed, program=program)
            state, kept, is_new_BT, number, num_done, is_over_B = denoise_block(
                network, state, kept, number, np.int32(max_steps), key, fixed, program=program
            )
        # Waits for the device: dozens of dispatched programs deadlock where several processes share
        # a mesh of CPU devices, because those that wait for their turn hold the threads on which
        # the collectives would meet.
        now = block
        block, num_done, is_over_B = jax.device_get((number, num_done, is_over_B))
        block = int(block)
        step += int(num_done)
        if num_done:
            yield DenoiseStep(
                state.canvas_BT,
                is_new_BT,
                step,
                steps,
                now + 1,
                num_blocks,
                state.num_steps_B,
                state.confidence_BT if with_confidence else None,
            )
        if is_over_B.all() or block >= blocks.stop:
            return


def _program_of_block(
    program: BlockProgram, block: int, cache: str, *, width: int, lookahead: int
) -> BlockProgram:
    """Returns the program for a block: how much of the canvas the network has to see, and how much
    of that a pass with a cache computes.
    """
    num_left = program.gen_length - block * program.block_length
    if program.is_bounded:
        num_left = min(num_left, program.block_length + lookahead)
        num_seen = block * program.block_length + num_left
        # Cut to quarters of the generation and not to the column: every width is compiled.
        piece = program.block_length * -(-program.gen_length // (4 * program.block_length))
        num_seen = min(program.gen_length, -(-num_seen // piece) * piece)
        program = program._replace(width=width - program.gen_length + num_seen)
    if cache == "none":
        return program
    # What stands behind the block is computed with it unless its cache is kept too.
    return program._replace(window=num_left if cache == "prefix" else program.block_length)


def generate(logits_fn: Callable, canvas_BT: Any, key: Array, **settings: Any) -> jax.Array:
    """Returns the canvas after the last step; takes exactly what `denoise` takes."""
    for state in denoise(logits_fn, canvas_BT, key, each_step=False, **settings):
        canvas_BT = state.canvas_BT
    return canvas_BT
