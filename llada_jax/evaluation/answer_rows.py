"""Answers in rows of a few shapes, and what a network gives for their tokens."""

import contextlib
import functools
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster import sharding

# Columns of an answer whose logits exist at a time: 32 rows of them take 1 GB at 126,464 tokens.
HEAD_COLUMNS = 64

# Programs that are dispatched before the first of them is read.
MAX_IN_FLIGHT = 2


class Question(NamedTuple):
    """An answer and its surroundings, as token ids.

    noise: names the random numbers with which the answer is masked. None derives the name from
        `before` and `after`, so that the answers to one question are compared under the same noise
        and those to different questions are independent.
    """

    before: Sequence[int]
    answer: Sequence[int]
    after: Sequence[int] = ()
    noise: int | None = None


def noise_of(tokens: Sequence[int], times: int = 0) -> int:
    """Returns the name of random numbers that belong to `tokens`, 32 bits.

    Args:
        times: how often the same tokens have been asked about before; their errors average out only
            if each time has random numbers of its own.
    """
    named = [*tokens, -2, times] if times else tokens
    return zlib.crc32(np.array(named, np.int32).tobytes())


def bucket(length: int) -> int:
    """Returns the width to which a part of a row is filled up: 0, 8, 16, 32 or 64, and from there
    at most four widths per doubling, all multiples of 64.

    Lengths share compiled programs that way, and less than a fifth of a long row is padding.
    """
    if length <= 64:
        return 0 if length == 0 else max(8, 1 << (length - 1).bit_length())
    step = max(64, 1 << ((length - 1).bit_length() - 3))
    return -(-length // step) * step


class Rows(NamedTuple):
    """What the network is given, and what it is asked: T columns, A of them the answer's."""

    inputs_BT: np.ndarray
    segment_ids_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BA: np.ndarray
    where_BA: np.ndarray


def lay_out(
    tokens: Question, targets: Sequence[int], where_NL: np.ndarray, widths: tuple, *, pad_id: int
) -> Rows:
    """Returns one row per line of where_NL: what stands before the answer ends at column widths[0],
    the answer begins there, and what stands after begins at widths[0] + widths[1].

    The gaps between them are padding, which no token attends to; positions run on as if there were
    none.
    """
    before, width, _ = widths
    length, num_rows = len(tokens.answer), len(where_NL)
    parts = (tokens.before, tokens.answer, tokens.after)
    firsts = (before - len(tokens.before), before, before + width)
    row_T = np.full(sum(widths), pad_id, np.int32)
    segment_ids_T, positions_T = np.zeros_like(row_T), np.zeros_like(row_T)
    position = 0
    for first, part in zip(firsts, parts, strict=True):
        columns = slice(first, first + len(part))
        row_T[columns], segment_ids_T[columns] = part, 1
        positions_T[columns] = np.arange(position, position + len(part))
        position += len(part)
    targets_A = np.zeros(width, np.int32)
    targets_A[:length] = targets
    where_NA = np.zeros((num_rows, width), bool)
    where_NA[:, :length] = where_NL

    def repeated(array):
        return np.tile(array, (num_rows, 1))

    return Rows(
        repeated(row_T),
        repeated(segment_ids_T),
        repeated(positions_T),
        repeated(targets_A),
        where_NA,
    )


def diffusion_rows(question: Question, is_masked_NL: np.ndarray, widths: tuple, ids: Any) -> Rows:
    rows = lay_out(question, question.answer, is_masked_NL, widths, pad_id=ids.pad_id)
    columns = slice(widths[0], widths[0] + widths[1])
    answer_BA = rows.inputs_BT[:, columns]
    rows.inputs_BT[:, columns] = np.where(rows.where_BA, ids.mask_id, answer_BA)
    return rows


def causal_rows(question: Question, widths: tuple, ids: Any) -> Rows:
    """The row shifted by one, with BOS in front, as in llada_jax.objectives.autoregressive."""
    shifted = [ids.bos_id, *question.before, *question.answer][:-1]
    split = len(question.before)
    inputs = Question(shifted[:split], shifted[split:])
    every = np.ones((1, len(question.answer)), bool)
    return lay_out(inputs, question.answer, every, widths, pad_id=ids.pad_id)


# ---- through the network


def _nll_of_targets(
    params: dict,
    rows: Rows,
    mask_id: Array,
    cfg_scale: Array,
    *,
    hidden_fn: Callable,
    head_fn: Callable,
    start: int,
    is_guided: bool,
) -> tuple[Array, Array]:
    """Returns the nll of every target, float32 [B, A], and whether it is the most likely token.

    Only the columns from `start` on, the answer's, go through the head, HEAD_COLUMNS at a time.
    """
    width = rows.targets_BA.shape[1]
    others = (rows.segment_ids_BT, rows.positions_BT)
    versions: list[Any] = [rows.inputs_BT]
    if is_guided:
        # the unconditional model sees the answer alone: everything else is masked
        column_T = jnp.arange(rows.inputs_BT.shape[1])
        is_answer_T = (column_T >= start) & (column_T < start + width)
        versions.append(jnp.where(is_answer_T, rows.inputs_BT, mask_id))
    hidden = [
        hidden_fn(params, inputs_BT, *others)[:, start : start + width] for inputs_BT in versions
    ]
    num_pieces = -(-width // HEAD_COLUMNS)

    def cut(array):
        """[B, A, ...] -> [pieces, B, A / pieces, ...]"""
        pieces = array.reshape(len(array), num_pieces, width // num_pieces, *array.shape[2:])
        return jnp.moveaxis(pieces, 1, 0)

    def score(piece):
        hidden, targets_BC = piece
        logits_BCV, *unprompted = [head_fn(params, h) for h in hidden]
        for unprompted_BCV in unprompted:
            logits_BCV = unprompted_BCV + (cfg_scale + 1) * (logits_BCV - unprompted_BCV)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC
        return nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

    pieces = jax.lax.map(score, jax.tree.map(cut, (hidden, rows.targets_BA)))
    return jax.tree.map(lambda piece: jnp.moveaxis(piece, 0, 1).reshape(-1, width), pieces)


_STATIC = ("hidden_fn", "head_fn", "start", "is_guided")


@functools.partial(jax.jit, static_argnames=_STATIC)
def nll_of_answers(
    params: dict, rows: Rows, mask_id: Array, cfg_scale: Array, **static: Any
) -> tuple[Array, Array]:
    """Returns the nll summed over where_BA, float32 [B], and whether all of these targets are the
    most likely tokens, bool [B].
    """
    nll_BA, is_correct_BA = _nll_of_targets(params, rows, mask_id, cfg_scale, **static)
    nll_B = jnp.where(rows.where_BA, nll_BA, 0.0).sum(axis=1)
    result = nll_B, (is_correct_BA | ~rows.where_BA).all(axis=1)
    # whole on every device, so that each process can read it
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, None), result)


@functools.partial(jax.jit, static_argnames=_STATIC)
def nll_in_confidence_order(
    params: dict, rows: Rows, mask_id: Array, cfg_scale: Array, **static: Any
) -> tuple[Array, Array]:
    """Returns what nll_of_answers does, where the tokens of where_BA are revealed one at a time,
    always the likeliest of those that are still masked.
    """
    start, width = static["start"], rows.targets_BA.shape[1]
    columns = slice(start, start + width)

    def reveal(carry):
        inputs_BT, where_BA, nll_B, is_correct_B = carry
        now = rows._replace(inputs_BT=inputs_BT)
        nll_BA, is_correct_BA = _nll_of_targets(params, now, mask_id, cfg_scale, **static)
        nll_BA = jnp.where(where_BA, nll_BA, jnp.inf)
        best_B = jnp.argmin(nll_BA, axis=1)
        # none, in a row that has ended before others of its batch
        is_best_BA = (jnp.arange(width) == best_B[:, None]) & where_BA
        answer_BA = jnp.where(is_best_BA, rows.targets_BA, inputs_BT[:, columns])
        return (
            inputs_BT.at[:, columns].set(answer_BA),
            where_BA & ~is_best_BA,
            nll_B + jnp.where(is_best_BA, nll_BA, 0.0).sum(axis=1),
            is_correct_B & (is_correct_BA | ~is_best_BA).all(axis=1),
        )

    num_rows = len(rows.where_BA)
    first = (rows.inputs_BT, rows.where_BA, jnp.zeros(num_rows), jnp.ones(num_rows, bool))
    *_, nll_B, is_correct_B = jax.lax.while_loop(lambda carry: carry[1].any(), reveal, first)
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, None), (nll_B, is_correct_B))


def _batches(pieces: Iterator[Rows], batch_size: int) -> Iterator[tuple[Rows, int]]:
    """Joins rows into batches of one size; yields each with its number of rows that count."""
    waiting: list[Rows] = []
    num_waiting = 0

    def take(num: int) -> Rows:
        nonlocal waiting, num_waiting
        joined = Rows(*(np.concatenate(arrays) for arrays in zip(*waiting, strict=True)))
        waiting = [Rows(*(array[num:] for array in joined))]
        num_waiting -= num
        return Rows(*(array[:num] for array in joined))

    for piece in pieces:
        waiting.append(piece)
        num_waiting += len(piece.inputs_BT)
        while num_waiting >= batch_size:
            yield take(batch_size), batch_size
    if num_waiting:
        num = num_waiting
        # filled up with copies of the last row; another size would be compiled again
        yield Rows(*(np.pad(a, ((0, batch_size - num), (0, 0)), "edge") for a in take(num))), num


def run(
    program: Callable,
    model: Any,
    params: dict,
    pieces: Iterator[Rows],
    *,
    start: int,
    batch_size: int,
    mask_id: int,
    cfg_scale: float,
    mesh: Mesh | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nll of all rows, float64, and whether all scored targets are the most likely.

    Args:
        program: nll_of_answers or nll_in_confidence_order.
    """
    placed = None
    if mesh is not None:
        ways = sharding.axis_size(mesh, "act_batch")
        batch_size = -(-batch_size // ways) * ways
        placed = NamedSharding(mesh, sharding.spec(("act_batch", None)))
    nll, is_correct = [], []
    in_flight: deque = deque()

    def read():
        result, num = in_flight.popleft()
        nll_B, is_correct_B = jax.device_get(result)
        nll.append(nll_B[:num].astype(np.float64))
        is_correct.append(is_correct_B[:num])

    for rows, num in _batches(pieces, batch_size):
        if placed is not None:
            here = sharding.local_rows(placed, rows.inputs_BT.shape)
            local = {name: array[here] for name, array in rows._asdict().items()}
            rows = Rows(**sharding.place_batch(local, here, batch_size, placed))
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            result = program(
                params,
                rows,
                np.int32(mask_id),
                np.float32(cfg_scale),
                hidden_fn=model.hidden_fn,
                head_fn=model.head_fn,
                start=start,
                is_guided=cfg_scale > 0,
            )
        in_flight.append((result, num))
        if len(in_flight) > MAX_IN_FLIGHT:
            read()
    while in_flight:
        read()
    return np.concatenate(nll), np.concatenate(is_correct)
