"""What a request may ask of the samplers: ranges of settings, and which exclude each other."""

import math
import operator
from collections.abc import Sequence
from typing import Any

from llada_jax.errors import UserError, look_up
from llada_jax.ranges import (
    MAX_INT,
    MAX_SIZE,
    SIZE,
    SIZE_OR_NONE,
    STRENGTH,
    check_number,
)
from llada_jax.samplers.commit import SCHEDULE, parse_commit
from llada_jax.samplers.remasking import REMASKING, commit_rule
from llada_jax.samplers.revise import LOOP, NONE, WINO, parse_revise

EOS = {
    "free": "the end-of-text token is proposed and kept like any other",
    "never": "its logits are off",
    "last": "where it is proposed, it is kept after all other proposals",
}
CACHES = {
    "none": "every pass computes the whole canvas",
    "prefix": "keys and values of what stands before the current block are kept",
    "dual": "and of what stands behind it",
}


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
        check_number(f"{name}=", value, SIZE)
    if gen_length % block_length:
        small = [n for n in range(1, math.isqrt(gen_length) + 1) if gen_length % n == 0]
        divisors = sorted({*small, *(gen_length // n for n in small)})
        raise UserError(
            f"block_length={block_length} must divide gen_length={gen_length}; "
            f"nearest: {min(divisors, key=lambda n: abs(n - block_length))}."
        )
    # before the blocks, so that the nearest number that is named below is never too large
    if steps > gen_length:
        raise UserError(
            f"steps={steps} must not exceed gen_length={gen_length}, because every step reveals at "
            f"least one token; use steps={gen_length}."
        )
    num_blocks = gen_length // block_length
    if steps % num_blocks:
        lower = steps // num_blocks * num_blocks
        nearest = f"{lower} or {lower + num_blocks}" if lower else f"{num_blocks}"
        raise UserError(
            f"steps={steps} must be a multiple of the number of blocks, gen_length/block_length = "
            f"{gen_length}/{block_length} = {num_blocks}; nearest: {nearest}."
        )
    check_strengths(temperature=temperature, cfg_scale=cfg_scale)


def check_strengths(**strengths: float) -> None:
    """Raises UserError for a temperature or a cfg_scale that is not in the range of strengths."""
    for name, strength in strengths.items():
        if not STRENGTH.holds(strength):
            raise UserError(
                f"{name}={strength} must be a number from {STRENGTH.least} to {STRENGTH.most:g}; "
                "use 0 to switch it off."
            )


def check_options(
    *,
    remasking: str = "low_confidence",
    commit: str = SCHEDULE,
    revise: str = NONE,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: str = "free",
    has_eos: bool = True,
    suppress: Sequence[int] = (),
    num_ids: int | None = None,
    cache: str = "none",
    refresh: int = 0,
    append: bool = False,
    lookahead: int | None = None,
) -> None:
    """Raises UserError for an option that is unknown, out of range or without effect."""
    commit_rule(remasking)
    name = parse_commit(commit).name
    if name != SCHEDULE and remasking != "low_confidence":
        raise UserError(
            f"commit={commit} keeps the surest tokens, and remasking={remasking} names another "
            f"order; leave remasking out, or use commit={SCHEDULE}."
        )
    reviser = parse_revise(revise).name
    if reviser == LOOP and name != SCHEDULE:
        raise UserError(
            f"revise={revise} has a schedule of its own, and commit={commit} goes ahead of it; "
            "leave one of them out, or use revise=remdm-cap."
        )
    if reviser == WINO and cache != "none":
        raise UserError(
            f"revise={revise} reads the block and its shadow in one pass over the whole canvas, "
            f"without a cache; leave cache={cache} out, or use another rule that revises."
        )
    if top_k < 0:
        raise UserError(f"top_k={top_k} must not be negative; use 0 to keep every token.")
    check_number("top_k=", top_k, SIZE_OR_NONE)
    if not 0 < top_p <= 1:
        raise UserError(
            f"top_p={top_p} must be greater than 0 and at most 1; use 1 to keep every token."
        )
    if temperature == 0 and (top_k or top_p < 1):
        raise UserError(
            f"top_k={top_k} and top_p={top_p} restrict what is drawn, and temperature=0 draws "
            "nothing; set a temperature, or leave them out."
        )
    look_up(EOS, eos, "treatment of the end-of-text token")
    if eos != "free" and not has_eos:
        raise UserError(f"eos={eos} needs eos_id, the id of the end-of-text token.")
    for token in suppress:
        most = MAX_INT if num_ids is None else num_ids - 1
        if not _is_whole(token) or not 0 <= token <= most:
            raise UserError(f"suppress={token} is not the id of a token; ids are 0 to {most}.")
    look_up(CACHES, cache, "cache")
    if refresh < 0:
        raise UserError(
            f"refresh={refresh} must not be negative; 1 computes everything in every step, and 0 "
            "once per block."
        )
    check_number("refresh=", refresh, SIZE_OR_NONE)
    if refresh and cache == "none":
        raise UserError(
            f"refresh={refresh} is about a cache, and there is none; set cache=prefix or "
            "cache=dual, or leave it out."
        )
    if lookahead is not None and lookahead < 0:
        raise UserError(
            f"lookahead={lookahead} must not be negative; 0 shows nothing behind the current block."
        )
    check_number("lookahead=", lookahead or 0, SIZE_OR_NONE)
    if lookahead is not None and append:
        raise UserError(
            f"append is lookahead=0, and lookahead={lookahead} is given too; keep one of them."
        )


def _is_whole(value: Any) -> bool:
    # True is an index too, and never an id here.
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_proposals(
    suppress: Sequence[int], *, also_off: Sequence[int], num_ids: int | None
) -> None:
    """Raises UserError where no token is left that could be proposed.

    Args:
        also_off: ids that are never proposed whatever `suppress` says, such as the mask.
        num_ids: of the tokenizer; None: unknown, and nothing is checked.
    """
    if num_ids is None:
        return
    # not a set of the whole vocabulary, which costs 20 ms
    off = {operator.index(token) for token in (*suppress, *also_off)}
    if sum(0 <= token < num_ids for token in off) == num_ids:
        raise UserError(
            f"The {len(suppress)} ids of suppress leave none of the {num_ids} ids of the "
            "tokenizer to be proposed, because the mask never is, nor EOS with eos=never; leave "
            "some of them out."
        )


def may_draw(*, temperature: float, remasking: str, revise: str) -> bool:
    """Returns whether two texts of one prompt may differ: whether anything is drawn.

    A rule of the user's own is given random keys, and may draw from them.
    """
    is_order_fixed = remasking in REMASKING and remasking != "random"
    is_kept = parse_revise(revise).name in (NONE, WINO)
    return temperature > 0 or not is_order_fixed or not is_kept


def check_request(*, num_prompts: int, batch_size: int, seed: int) -> None:
    """Raises UserError for a request that cannot be cut into batches or seeded."""
    if num_prompts < 1:
        raise UserError(
            'There are 0 prompts, and sampling needs at least one; pass an empty one, [""], to '
            "generate from nothing."
        )
    if num_prompts > MAX_SIZE:
        raise UserError(
            f"There are {num_prompts} texts to generate, and a request has at most {MAX_SIZE}; ask "
            "for fewer at a time."
        )
    check_number("batch_size=", batch_size, SIZE)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and 2**32 - 1.")
