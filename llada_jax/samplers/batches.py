"""Requests cut into batches of one shape: which rows are denoised together, and in which order.

Rows of similar length stand together, so that little is padding and each width is compiled once.
Where texts may end early, rows leave: after every block the unfinished rows of all batches are put
together again, and a pass is spent on a row that has ended only where no other is left. Neither
changes a text, because no row sees another and the noise of a row depends on its own number.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.rng import key_for
from llada_jax.samplers.canvas import Canvas, width_of
from llada_jax.samplers.denoise import DenoiseStep, denoise


class Batch(NamedTuple):
    """Rows that have been denoised."""

    rows: list[int]  # their numbers in the request
    canvas_BT: np.ndarray
    num_steps_B: np.ndarray
    has_enough_B: np.ndarray  # bool: what is still masked is not wanted


def ignore_step(rows: range, state: DenoiseStep) -> None:
    """The listener of those who only want the result."""


def by_length(lengths: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Returns the rows so that those of one width stand together, otherwise in their order."""
    return sorted(rows, key=lambda row: width_of(lengths[row]))


def filled_up(rows: Sequence[int], batch_size: int) -> list[int]:
    """Returns the rows of a batch with copies of the last one behind them, because a batch of
    another size would be compiled again.
    """
    return [*rows, *[rows[-1]] * (batch_size - len(rows))]


class Request(NamedTuple):
    """What all batches of a request share.

    denoise: a canvas, the numbers of its rows and further settings -> the states of `denoise`.
    on_step, is_enough: see llada_jax.samplers.text.generate_tokens.
    """

    denoise: Callable[..., Iterator[DenoiseStep]]
    on_step: Callable[[range, DenoiseStep], None]
    is_enough: Callable[[Sequence[int], DenoiseStep], Sequence[bool]] | None

    @property
    def is_heard(self) -> bool:
        """Whether a listener is called between the steps, which counts on rows in their order."""
        return self.on_step is not ignore_step

    def run(self, canvas: Canvas, rows: Sequence[int], batch_size: int, **settings: Any) -> Batch:
        """Returns what becomes of a canvas whose first rows have these numbers."""
        has_enough_B = np.zeros(len(rows), bool)
        for state in self.denoise(canvas, filled_up(rows, batch_size), **settings):
            if self.is_heard:
                self.on_step(range(rows[0], rows[0] + len(rows)), state)
            if self.is_enough is not None:
                has_enough_B = np.array(self.is_enough(rows, state), bool)
                if has_enough_B.all():
                    break
        canvas_BT, num_steps_B = jax.device_get((state.canvas_BT, state.num_steps_B))
        return Batch(list(rows), canvas_BT[: len(rows)], num_steps_B[: len(rows)], has_enough_B)


def make_request(
    logits_fn: Callable,
    params: dict,
    *,
    mask_id: int,
    cached_fn: Callable | None,
    shadow_fn: Callable | None,
    seed: int,
    on_step: Callable[[range, DenoiseStep], None],
    is_enough: Callable[[Sequence[int], DenoiseStep], Sequence[bool]] | None = None,
    noise_numbers: Sequence[int] | None = None,
    **settings: Any,
) -> Request:
    """Returns a request with the parameters bound to the functions of the network."""
    bind = jax.tree_util.Partial
    network: dict[str, Any] = {
        "cached_fn": cached_fn and bind(cached_fn, params),
        "shadow_fn": shadow_fn and bind(shadow_fn, params),
    }

    def run(canvas: Canvas, row_B: Sequence[int], **schedule: Any) -> Iterator[DenoiseStep]:
        return denoise(
            bind(logits_fn, params),
            canvas.tokens_BT,
            key_for("sampling", seed),
            mask_id=mask_id,
            is_fixed_BT=canvas.is_fixed_BT,
            segment_ids_BT=canvas.segment_ids_BT,
            positions_BT=canvas.positions_BT,
            row_B=[noise_numbers[row] for row in row_B] if noise_numbers is not None else row_B,
            each_step=on_step is not ignore_step,
            **network,
            **schedule,
            **settings,
        )

    return Request(run, on_step, is_enough)


def whole_batches(
    request: Request,
    lengths: Sequence[int],
    make: Callable[[Sequence[int]], tuple[Canvas, dict]],
    *,
    batch_size: int,
    of_one_width: bool = False,
) -> Iterator[Batch]:
    """Denoises one batch after the other from its first block to its last: of rows of similar
    length, or in the order of the request where there is a listener.

    Args:
        make: the canvas of some rows, and the schedule of their batch.
        of_one_width: end a batch where the width of its rows would change, because its schedule
            follows from the width.
    """
    order = list(range(len(lengths)))
    if not request.is_heard:
        order = by_length(lengths, order)
    batch_size = min(batch_size, len(order))
    for _, part in groupby(order, lambda row: of_one_width and width_of(lengths[row])):
        rows_of_part = list(part)
        for first in range(0, len(rows_of_part), batch_size):
            rows = rows_of_part[first : first + batch_size]
            canvas, schedule = make(filled_up(rows, batch_size))
            yield request.run(canvas, rows, batch_size, **schedule)


def block_batches(
    request: Request,
    lengths: Sequence[int],
    make: Callable[[Sequence[int]], tuple[Canvas, dict]],
    *,
    mask_id: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Denoises block by block, each time a batch of rows that have come equally far: the furthest
    that fill a batch, or else the rows that are furthest behind, which then catch up with others.

    make: see `whole_batches`. What has been generated of a row replaces the masks of its canvas.
    """
    batch_size = min(batch_size, len(lengths))
    waiting: dict[int, list[int]] = {0: by_length(lengths, range(len(lengths)))}
    generated: dict[int, np.ndarray] = {}
    num_steps: dict[int, int] = dict.fromkeys(range(len(lengths)), 0)
    while waiting:
        full = [block for block, rows in waiting.items() if len(rows) >= batch_size]
        block = max(full) if full else min(waiting)
        rows, left = waiting[block][:batch_size], waiting[block][batch_size:]
        if left:
            waiting[block] = left
        else:
            del waiting[block]
        canvas, schedule = make(filled_up(rows, batch_size))
        gen_length = schedule["gen_length"]
        tokens_BT = canvas.tokens_BT.copy()
        for place, row in enumerate(filled_up(rows, batch_size)):
            if row in generated:
                tokens_BT[place, -gen_length:] = generated[row]
        canvas = canvas._replace(tokens_BT=tokens_BT)
        done = request.run(canvas, rows, batch_size, blocks=range(block, block + 1), **schedule)
        is_over_B = ~(done.canvas_BT[:, -gen_length:] == mask_id).any(axis=1) | done.has_enough_B
        for row, canvas_T, num in zip(rows, done.canvas_BT, done.num_steps_B, strict=True):
            generated[row] = canvas_T[-gen_length:]
            num_steps[row] += int(num)
        unfinished = [row for row, is_over in zip(rows, is_over_B, strict=True) if not is_over]
        if unfinished:
            waiting[block + 1] = by_length(lengths, [*waiting.get(block + 1, []), *unfinished])
        if is_over_B.any():
            over = [row for row, is_over in zip(rows, is_over_B, strict=True) if is_over]
            numbers_B = np.array([num_steps[row] for row in over], np.int32)
            yield Batch(over, done.canvas_BT[is_over_B], numbers_B, done.has_enough_B[is_over_B])
