"""Sampling for whole requests: any number of prompts, as token ids or as text, cut into batches of
one shape.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.errors import UserError
from llada_jax.rng import key_for
from llada_jax.samplers.denoise import DenoiseStep, denoise, make_canvas


class Completion(NamedTuple):
    prompt: str
    text: str  # what follows the prompt, up to EOS
    tokens: list[int]  # the ids of `text`, without EOS
    num_steps: int  # denoising steps run for the batch in which it was generated


def ignore_step(rows: range, state: DenoiseStep) -> None:
    """The listener of those who only want the result."""


def check_request(*, num_prompts: int, batch_size: int, seed: int) -> None:
    """Raises UserError for a request that cannot be cut into batches or seeded."""
    if num_prompts < 1:
        raise UserError(
            'There are 0 prompts, and sampling needs at least one; pass an empty one, [""], to '
            "generate from nothing."
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and 2**32 - 1.")


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
    remasking: str = "low_confidence",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    eos_id: int | None = None,
    num_ids: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    on_step: Callable[[range, DenoiseStep], None] = ignore_step,
) -> tuple[np.ndarray, np.ndarray]:
    """Generates `gen_length` tokens after each prompt.

    Args:
        logits_fn: (params, tokens_BT, segment_ids_BT, positions_BT, start=, length=) -> logits of
            `length` columns, see llada_jax.samplers.denoise; the same object in every call, so that
            its compiled step is found again.
        params: its first argument, a pytree of arrays.
        prompts: token ids, of any lengths, empty for unconditional generation.
        block_length, steps: None means gen_length: pure diffusion, one token per step.
        eos_id, num_ids: see `denoise`; None does not stop, and excludes nothing.
        seed: row r of the request draws the same numbers whatever the batch size and the other
            prompts are.
        batch_size: rows in one pass; the logits take batch_size * block_length * vocabulary
            float32 numbers, and twice that with guidance.
        on_step: called as on_step(rows, state) after each step; `rows` are the numbers of the
            prompts that the first rows of the canvas continue.
        The others: see `denoise`.

    Returns:
        tokens int32 [number of prompts, gen_length], and the number of steps run for each, int32.
    """
    check_request(num_prompts=len(prompts), batch_size=batch_size, seed=seed)
    batch_size = min(batch_size, len(prompts))
    tokens_BT = np.empty((len(prompts), gen_length), np.int32)
    num_steps_B = np.empty(len(prompts), np.int32)
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        # The last batch is filled up with copies of its last row, because a batch of another size
        # would be compiled again.
        batch = [prompts[min(row, rows[-1])] for row in range(first, first + batch_size)]
        canvas = make_canvas(batch, gen_length=gen_length, mask_id=mask_id, pad_id=pad_id)
        for state in denoise(
            jax.tree_util.Partial(logits_fn, params),
            canvas.tokens_BT,
            key_for("sampling", seed),
            mask_id=mask_id,
            is_fixed_BT=canvas.is_fixed_BT,
            segment_ids_BT=canvas.segment_ids_BT,
            positions_BT=canvas.positions_BT,
            gen_length=gen_length,
            block_length=gen_length if block_length is None else block_length,
            steps=gen_length if steps is None else steps,
            remasking=remasking,
            temperature=temperature,
            cfg_scale=cfg_scale,
            eos_id=eos_id,
            num_ids=num_ids,
            first_row=first,
        ):
            on_step(rows, state)
        tokens_BT[rows.start : rows.stop] = jax.device_get(state.canvas_BT)[
            : len(rows), -gen_length:
        ]
        num_steps_B[rows.start : rows.stop] = state.step
    return tokens_BT, num_steps_B


def cut_at_eos(tokens: Sequence[int], eos_id: int) -> list[int]:
    """Returns the tokens before the first EOS."""
    tokens = [int(token) for token in tokens]
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


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
        stop_at_eos: end a text at EOS, and the sampling when all have ended. False generates all
            tokens, as published; the text is what the tokenizer makes of all of them.
        settings: gen_length and everything else that `generate_tokens` takes.
    """
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens_BT, num_steps_B = generate_tokens(
        logits_fn,
        params,
        prompt_ids,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id if stop_at_eos else None,
        num_ids=tokenizer.vocab_size,
        **settings,
    )
    completions = []
    for prompt, ids, row, num_steps in zip(
        prompts, prompt_ids, tokens_BT, num_steps_B, strict=True
    ):
        tokens = cut_at_eos(row, tokenizer.eos_id) if stop_at_eos else row.tolist()
        completions.append(
            Completion(prompt, decode_after(tokenizer, ids, tokens), tokens, int(num_steps))
        )
    return completions
