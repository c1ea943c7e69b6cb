"""Sampling for whole requests: any number of prompts, as token ids or as text, cut into batches of
one shape.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.errors import UserError
from llada_jax.ranges import SIZE, check_number
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.batches import (
    block_batches,
    ignore_step,
    make_request,
    whole_batches,
)
from llada_jax.samplers.canvas import Canvas, make_canvas, make_infill_canvas
from llada_jax.samplers.commit import SCHEDULE
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.revise import NONE
from llada_jax.samplers.settings import check_request

# Settings that only denoising has, with the values that mean nothing.
DENOISING = {
    "block_length": None,
    "steps": None,
    "remasking": "low_confidence",
    "commit": SCHEDULE,
    "revise": NONE,
    "append": False,
    "lookahead": None,
    "cfg_scale": 0.0,
    "eos": "free",
    "cache": "none",
    "refresh": 0,
}
GAP = re.compile(r"\[MASK(?::([0-9]{1,6}))?\]")


class Completion(NamedTuple):
    prompt: str
    text: str  # what follows the prompt, up to its end
    tokens: list[int]  # the ids of `text`, without EOS or the end of a turn
    num_steps: int  # passes of the network that it needed


def generate_tokens(
    logits_fn: Callable,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    mask_id: int,
    pad_id: int,
    gen_length: int,
    block_length: int | None = None,
    steps: int | None = None,
    cached_fn: Callable | None = None,
    shadow_fn: Callable | None = None,
    eos_id: int | Sequence[int] | None = None,
    stop_at_eos: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    is_enough: Callable[[Sequence[int], DenoiseStep], Sequence[bool]] | None = None,
    noise_numbers: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Generates `gen_length` tokens after each prompt.

    Args:
        logits_fn: (params, tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> logits of
            `length` columns, see llada_jax.samplers.denoise; the same object in every call, so that
            its compiled step is found again.
        params: its first argument, a pytree of arrays.
        prompts: token ids, of any lengths, empty for unconditional generation.
        block_length, steps: None means gen_length: pure diffusion, one token per step.
        cached_fn: for cache="prefix" and "dual", see llada_jax.samplers.network; takes `params`
            first.
        shadow_fn: for revise="wino", see there; takes `params` first too.
        seed: row r of the request draws the same numbers whatever the batch size and the other
            prompts are.
        noise_numbers: what stands for r in that: int32, one for each prompt; None: 0, 1, 2, ...
        batch_size: rows in one pass, of similar length; the logits take batch_size * block_length *
            vocabulary float32 numbers, and twice that with guidance.
        on_step: called as on_step(rows, state) after each step; `rows` are the numbers of the
            prompts that the first rows of the canvas continue. Without it the host is asked once
            per block.
        is_enough: asked after each block with the numbers of the prompts, in any order, which rows
            have enough. When all have, the batch ends, and tokens that have not been generated
            remain `mask_id`.
        eos_id, stop_at_eos: see llada_jax.samplers.denoise.denoise. Where texts end early and there
            are more prompts than batch_size, rows that have ended or have enough make room for
            others.
        settings: every other setting of llada_jax.samplers.denoise.denoise.

    Returns:
        tokens int32 [number of prompts, gen_length], and the passes of the network that each row
        needed, int32.
    """

    def make(rows: Sequence[int]) -> tuple[Canvas, dict]:
        batch = [prompts[row] for row in rows]
        canvas = make_canvas(batch, gen_length=gen_length, mask_id=mask_id, pad_id=pad_id)
        return canvas, {
            "gen_length": gen_length,
            "block_length": gen_length if block_length is None else block_length,
            "steps": gen_length if steps is None else steps,
        }

    check_request(num_prompts=len(prompts), batch_size=batch_size, seed=seed)
    check_number("gen_length=", gen_length, SIZE)
    request = make_request(
        logits_fn,
        params,
        mask_id=mask_id,
        cached_fn=cached_fn,
        shadow_fn=shadow_fn,
        seed=seed,
        on_step=on_step,
        is_enough=is_enough,
        noise_numbers=noise_numbers,
        eos_id=eos_id,
        stop_at_eos=stop_at_eos,
        **settings,
    )
    lengths = [len(prompt) for prompt in prompts]
    ends_early = (eos_id is not None and stop_at_eos) or is_enough is not None
    is_leaving = ends_early and len(prompts) > batch_size and not request.is_heard
    if is_leaving and block_length not in (None, gen_length):
        batches = block_batches(request, lengths, make, mask_id=mask_id, batch_size=batch_size)
    else:
        batches = whole_batches(request, lengths, make, batch_size=batch_size)
    tokens_BT = np.empty((len(prompts), gen_length), np.int32)
    num_steps_B = np.empty(len(prompts), np.int32)
    for batch in batches:
        tokens_BT[batch.rows] = batch.canvas_BT[:, -gen_length:]
        num_steps_B[batch.rows] = batch.num_steps_B
    return tokens_BT, num_steps_B


def infill_tokens(
    logits_fn: Callable,
    params: dict,
    texts: Sequence[Sequence[int]],
    is_given: Sequence[Sequence[bool]],
    *,
    mask_id: int,
    pad_id: int,
    steps: int | None = None,
    revise: str = NONE,
    shadow_fn: Callable | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    **settings: Any,
) -> tuple[list[list[int]], np.ndarray]:
    """Fills the gaps of texts: pure diffusion over the tokens that are not given.

    Args:
        logits_fn, params, shadow_fn, seed, batch_size, on_step: see `generate_tokens`.
        texts, is_given: see llada_jax.samplers.canvas.make_infill_canvas.
        steps: passes of the network; None means one token per step. A text with fewer gaps than
            that takes fewer.
        revise: see llada_jax.samplers.denoise.denoise.
        settings: the other settings of llada_jax.samplers.denoise.denoise, but for blocks, caches
            and the end of the text: a gap has the length that it has.

    Returns:
        the texts with their gaps filled, and the passes that each needed, int32.
    """
    num_gaps = [sum(not given for given in row) for row in is_given]
    check_request(num_prompts=len(texts), batch_size=batch_size, seed=seed)
    for number, gaps in enumerate(num_gaps):
        if not gaps:
            raise UserError(f"Text {number} has no gap; give it at least one masked token to fill.")
    if steps is not None and not 1 <= steps <= max(num_gaps):
        raise UserError(
            f"steps={steps} must lie between 1 and the number of masked tokens, {max(num_gaps)}."
        )

    def make(rows: Sequence[int]) -> tuple[Canvas, dict]:
        canvas = make_infill_canvas(
            [texts[row] for row in rows],
            [is_given[row] for row in rows],
            mask_id=mask_id,
            pad_id=pad_id,
        )
        width = canvas.tokens_BT.shape[1]
        # One token per step: no text has more gaps, and none of this batch more than columns. Where
        # a rule that revises spreads over the steps, their number must not depend on other texts.
        most = max(num_gaps) if revise == NONE else width
        steps_or_all = min(most if steps is None else steps, width)
        return canvas, {"gen_length": width, "block_length": width, "steps": steps_or_all}

    request = make_request(
        logits_fn,
        params,
        mask_id=mask_id,
        cached_fn=None,
        shadow_fn=shadow_fn,
        seed=seed,
        on_step=on_step,
        revise=revise,
        **settings,
    )
    filled: list[list[int]] = [[] for _ in texts]
    num_steps_B = np.empty(len(texts), np.int32)
    lengths = [len(text) for text in texts]
    for batch in whole_batches(
        request, lengths, make, batch_size=batch_size, of_one_width=revise != NONE
    ):
        for row, canvas_T in zip(batch.rows, batch.canvas_BT, strict=True):
            filled[row] = canvas_T[: len(texts[row])].tolist()
        num_steps_B[batch.rows] = batch.num_steps_B
    return filled, num_steps_B


def without_denoising(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that `continue_tokens` takes too.

    Raises:
        UserError: one that is about denoising differs from its default.
    """
    for name, default in DENOISING.items():
        value = settings.get(name, default)
        if value != default:
            raise UserError(
                f"{name}={value} is about denoising, and this model predicts one token after the "
                "other; leave it out."
            )
    return {name: value for name, value in settings.items() if name not in DENOISING}


def cut_at_end(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Returns the tokens before the first that ends a text."""
    tokens = [int(token) for token in tokens]
    return tokens[: next((i for i, token in enumerate(tokens) if token in end_ids), None)]


def decode_after(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns the text of `tokens` where they follow `before`.

    Both are decoded together, because tokenizers drop the space in front of the first word they
    see.
    """
    before_text = tokenizer.decode(list(before))
    text = tokenizer.decode([*before, *tokens])
    if text.startswith(before_text):
        return text[len(before_text) :]
    # Only when the tokens complete a character of which `before` holds the first bytes.
    return tokenizer.decode(list(tokens))


def generate_text(
    logits_fn: Callable,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stop_at_eos: bool = True,
    **settings: Any,
) -> list[Completion]:
    """Generates text after each prompt.

    Args:
        logits_fn, params: see `generate_tokens`.
        tokenizer: encode, decode, vocab_size and the special ids (see llada_jax.data.tokenizer).
        prompts: text; "" generates unconditionally.
        stop_at_eos: end a text at EOS or at the end of a turn, and the sampling when all have
            ended. False generates all tokens, as published; the text is what the tokenizer makes of
            all of them.
        settings: gen_length and everything else that `generate_tokens` takes.
    """
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens_BT, num_steps_B = generate_tokens(
        logits_fn,
        params,
        prompt_ids,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.end_ids,
        stop_at_eos=stop_at_eos,
        num_ids=tokenizer.vocab_size,
        **settings,
    )
    return _completions(tokenizer, prompts, prompt_ids, tokens_BT, num_steps_B, stop_at_eos)


def continue_text(
    cached_fn: Callable,
    params: dict,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    stop_at_eos: bool = True,
    on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    **settings: Any,
) -> list[Completion]:
    """Generates text after each prompt with a causal network, token by token.

    Args:
        cached_fn, params: see llada_jax.samplers.autoregressive.continue_tokens.
        settings: gen_length and everything else that `continue_tokens` takes. The settings of
            `generate_text` that are about denoising, `on_step` among them, are refused unless they
            have their defaults.
        The others: see `generate_text`.
    """
    if on_step is not ignore_step:
        raise UserError(
            "on_step is called between steps of denoising, and this model predicts one token after "
            "the other; leave it out."
        )
    settings = without_denoising(settings)
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens_BT, num_steps_B = continue_tokens(
        cached_fn,
        params,
        prompt_ids,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.end_ids,
        stop_at_eos=stop_at_eos,
        num_ids=tokenizer.vocab_size,
        **settings,
    )
    return _completions(tokenizer, prompts, prompt_ids, tokens_BT, num_steps_B, stop_at_eos)


def _completions(
    tokenizer: Any,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    tokens_BT: np.ndarray,
    num_steps_B: np.ndarray,
    stop_at_eos: bool,
) -> list[Completion]:
    completions = []
    for prompt, ids, row, num_steps in zip(
        prompts, prompt_ids, tokens_BT, num_steps_B, strict=True
    ):
        tokens = cut_at_end(row, tokenizer.end_ids) if stop_at_eos else row.tolist()
        completions.append(
            Completion(prompt, decode_after(tokenizer, ids, tokens), tokens, int(num_steps))
        )
    return completions


def parse_gaps(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Returns a text with gaps as token ids, and which of them are given.

    "[MASK]" is one masked token and "[MASK:12]" are twelve. The parts between are encoded each for
    itself. A space in front of a gap belongs to the gap, because tokenizers join a space to the
    word behind it; byte tokenizers do not, and keep it.

    Raises:
        UserError: there is no gap, or one of no tokens.
    """
    parts = GAP.split(text)
    if len(parts) == 1:
        raise UserError(
            f"{text!r} has no gap; write [MASK:N] where N tokens are to be filled in, as in "
            "'The [MASK:4] sat on the mat.'"
        )
    tokens: list[int] = []
    is_given: list[bool] = []
    for number, part in enumerate(parts):
        if number % 2:
            length = int(part or 1)
            if not length:
                raise UserError(
                    f"[MASK:0] in {text!r} has no token to fill in; write at least [MASK:1]."
                )
            tokens += [tokenizer.mask_id] * length
            is_given += [False] * length
            continue
        is_before_gap = number < len(parts) - 1
        if is_before_gap and part.endswith(" ") and tokenizer.kind != "bytes":
            part = part[:-1]
        ids = []
        if part:
            ids = _encode_behind(tokenizer, part) if number else tokenizer.encode(part)
        tokens += ids
        is_given += [True] * len(ids)
    return tokens, is_given


def _encode_behind(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text that stands behind another one, where tokenizers that put a space
    in front of the first word they see must not do so.
    """
    ids = tokenizer.encode(text)
    # a second one, because ".," may be a single token
    for before in (".", "a"):
        mark = tokenizer.encode(before)
        if decode_after(tokenizer, mark, ids) == text:
            return ids
        both = tokenizer.encode(before + text)
        if both[: len(mark)] == mark:
            return both[len(mark) :]
    return ids


def infill_text(
    logits_fn: Callable,
    params: dict,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    suppress: Sequence[int] = (),
    **settings: Any,
) -> list[Completion]:
    """Fills the gaps of texts; the `text` and `tokens` of the results are the whole texts.

    Args:
        logits_fn, params, tokenizer: see `generate_text`.
        texts: with gaps as `parse_gaps` reads them.
        suppress: ids that are never proposed. What ends a text never is, because what stands behind
            a gap is given.
        settings: everything else that `infill_tokens` takes.
    """
    parsed = [parse_gaps(tokenizer, text) for text in texts]
    filled, num_steps_B = infill_tokens(
        logits_fn,
        params,
        [tokens for tokens, _ in parsed],
        [is_given for _, is_given in parsed],
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        suppress=(*suppress, *tokenizer.end_ids),
        num_ids=tokenizer.vocab_size,
        **settings,
    )
    return [
        Completion(text, tokenizer.decode(tokens), tokens, int(num_steps))
        for text, tokens, num_steps in zip(texts, filled, num_steps_B, strict=True)
    ]
