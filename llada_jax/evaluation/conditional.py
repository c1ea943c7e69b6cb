"""The log-likelihood of an answer, given what stands before and after it.

For masked diffusion this is a Monte Carlo estimate of the bound of LLaDA (arXiv 2502.09992): only
tokens of the answer are masked, all others are seen. Two estimators have the same expectation:

- "exact_count" (eq. 6): k ~ U{1..L} of the L tokens of the answer are masked, weight L / k. This is
  what the published evaluation code does, where 128 samples suffice.
- "uniform_time" (eq. 5): t ~ U(0, 1), every token is masked with probability t, weight 1 / t. It
  needs about ten times as many samples, because the number of masks is noise too.

Both cover the range of k or t evenly with all samples of an answer, where the published code
covers it once per mini-batch. Where an answer has no more than `num_samples` sets of masked
tokens, that is up to 7 tokens for 128 samples, "exact_count" computes its expectation instead of
drawing. An autoregressive model's log-likelihood is exact and takes one pass.
"""

import contextlib
import functools
import math
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster import sharding
from llada_jax.errors import UserError, did_you_mean
from llada_jax.masks import Mask
from llada_jax.ranges import DRAWS, SEED, SIZE, check_number

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


class Score(NamedTuple):
    """The log-likelihood of one answer.

    log_likelihood: in nats, summed over the answer; a lower bound in expectation for masked
        diffusion. standard_error: of the Monte Carlo; 0 where nothing was drawn, nan for one
        sample. num_tokens: of the answer. num_passes: rows that went through the network.
    is_most_likely: for an autoregressive model, whether each token of the answer is the most likely
        one at its place; None for masked diffusion, which has no order to ask in.
    """

    log_likelihood: float
    standard_error: float
    num_tokens: int
    num_passes: int
    is_most_likely: bool | None


# ---- which tokens are masked


class Draws(NamedTuple):
    """is_masked_NL bool: the sets of masked tokens. weight_N float64: of their summed nll; the
    estimate is the mean over the samples of weight times nll. is_exact: nothing was drawn.
    """

    is_masked_NL: np.ndarray
    weight_N: np.ndarray
    is_exact: bool


def every_subset(length: int) -> Draws:
    """Returns all sets of masked tokens with the weights that make the mean the expectation: a set
    of k tokens has probability 1 / (L * binomial(L, k)) and weight L / k.
    """
    number_N = np.arange(1, 2**length)
    is_masked_NL = (number_N[:, None] >> np.arange(length)) & 1 > 0
    k_N = is_masked_NL.sum(axis=1)
    weight_of_k = np.array([0.0, *(1 / (k * math.comb(length, k)) for k in range(1, length + 1))])
    return Draws(is_masked_NL, len(number_N) * weight_of_k[k_N], is_exact=True)


def exact_count(rng: np.random.Generator, length: int, num_samples: int) -> Draws:
    """Masks exactly k tokens, k stratified over all samples (LLaDA, eq. 6)."""
    # u before the priorities, and priorities of one token after the other: answers of different
    # lengths share the numbers as far as they go
    t_N = (np.arange(num_samples) + rng.random()) / num_samples
    priority_NL = rng.random((length, num_samples)).T
    k_N = np.clip(np.ceil(t_N * length), 1, length).astype(int)
    rank_NL = np.argsort(np.argsort(priority_NL, axis=1), axis=1)
    return Draws(rank_NL < k_N[:, None], length / k_N, is_exact=False)


def uniform_time(rng: np.random.Generator, length: int, num_samples: int) -> Draws:
    """Masks each token with probability p, stratified over all samples (LLaDA, eq. 5).

    p = (1 - eps) t + eps with eps = 1e-3, as in training, because the variance of the estimate is
    infinite without a floor; it costs a relative bias below eps.
    """
    t_N = (np.arange(num_samples) + rng.random()) / num_samples
    p_N = (1 - 1e-3) * t_N + 1e-3
    draw_NL = rng.random((length, num_samples)).T
    return Draws(draw_NL < p_N[:, None], 1 / p_N, is_exact=False)


ESTIMATORS = {"exact_count": exact_count, "uniform_time": uniform_time}


def _rng(seed: int, question: Question) -> np.random.Generator:
    noise = question.noise
    if noise is None:
        surroundings = [*question.before, -1, *question.after]  # -1 stands where the answer does
        noise = zlib.crc32(np.array(surroundings, np.int32).tobytes())
    return np.random.Generator(np.random.Philox(key=[seed, noise]))


def draws_of(question: Question, *, estimator: str, num_samples: int, seed: int) -> Draws:
    """Returns the sets of masked tokens with which an answer is scored."""
    length = len(question.answer)
    if estimator == "exact_count" and 2**length - 1 <= num_samples:
        return every_subset(length)
    return ESTIMATORS[estimator](_rng(seed, question), length, num_samples)


def mean_and_error(samples_N: np.ndarray) -> tuple[float, float]:
    """Returns the mean of stratified samples, in the order of the strata, and its standard error.

    The error comes from differences of neighbours: the spread of all samples also holds what
    differs between strata, and stratification has removed that from the mean. A single sample has
    the error nan.
    """
    num = len(samples_N)
    if num < 2:
        return float(samples_N.mean()), math.nan
    variance = np.sum(np.diff(samples_N) ** 2) / (2 * (num - 1))
    return float(samples_N.mean()), math.sqrt(variance / num)


# ---- rows of a few shapes


def bucket(length: int) -> int:
    """Returns the width to which a part of a row is filled up: 0, 8, 16, 32 or 64, and from there
    at most four widths per doubling, all multiples of 64.

    Lengths share compiled programs that way, and less than a fifth of a long row is padding.
    """
    if length <= 64:
        return 0 if length == 0 else max(8, 1 << (length - 1).bit_length())
    step = max(64, 1 << ((length - 1).bit_length() - 3))
    return -(-length // step) * step


class _Rows(NamedTuple):
    """What the network is given, and what it is asked: T columns, A of them the answer's."""

    inputs_BT: np.ndarray
    segment_ids_BT: np.ndarray
    positions_BT: np.ndarray
    targets_BA: np.ndarray
    where_BA: np.ndarray


def lay_out(
    tokens: Question, targets: Sequence[int], where_NL: np.ndarray, widths: tuple, *, pad_id: int
) -> _Rows:
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

    return _Rows(
        repeated(row_T),
        repeated(segment_ids_T),
        repeated(positions_T),
        repeated(targets_A),
        where_NA,
    )


def _diffusion_rows(question: Question, draws: Draws, widths: tuple, ids: Any) -> _Rows:
    rows = lay_out(question, question.answer, draws.is_masked_NL, widths, pad_id=ids.pad_id)
    columns = slice(widths[0], widths[0] + widths[1])
    answer_BA = rows.inputs_BT[:, columns]
    rows.inputs_BT[:, columns] = np.where(rows.where_BA, ids.mask_id, answer_BA)
    return rows


def _causal_rows(question: Question, widths: tuple, ids: Any) -> _Rows:
    """The row shifted by one, with BOS in front, as in llada_jax.objectives.autoregressive."""
    shifted = [ids.bos_id, *question.before, *question.answer][:-1]
    split = len(question.before)
    inputs = Question(shifted[:split], shifted[split:])
    every = np.ones((1, len(question.answer)), bool)
    return lay_out(inputs, question.answer, every, widths, pad_id=ids.pad_id)


# ---- through the network


@functools.partial(jax.jit, static_argnames=("hidden_fn", "head_fn", "start", "is_guided"))
def _nll_of_answers(
    params: dict,
    rows: _Rows,
    mask_id: Array,
    cfg_scale: Array,
    *,
    hidden_fn: Callable,
    head_fn: Callable,
    start: int,
    is_guided: bool,
) -> tuple[Array, Array]:
    """Returns the nll summed over where_BA, float32 [B], and whether all of these targets are the
    most likely tokens, bool [B].

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
        hidden, targets_BC, where_BC = piece
        logits_BCV, *unprompted = [head_fn(params, h) for h in hidden]
        for unprompted_BCV in unprompted:
            logits_BCV = unprompted_BCV + (cfg_scale + 1) * (logits_BCV - unprompted_BCV)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC
        is_correct_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        nll_B = jnp.where(where_BC, nll_BC, 0.0).sum(axis=1)
        return nll_B, (is_correct_BC | ~where_BC).all(axis=1)

    pieces = jax.tree.map(cut, (hidden, rows.targets_BA, rows.where_BA))
    nll_PB, is_correct_PB = jax.lax.map(score, pieces)
    result = nll_PB.sum(axis=0), is_correct_PB.all(axis=0)
    # whole on every device, so that each process can read it
    return jax.tree.map(lambda leaf: sharding.constrain(leaf, None), result)


def _batches(pieces: Iterator[_Rows], batch_size: int) -> Iterator[tuple[_Rows, int]]:
    """Joins rows into batches of one size; yields each with its number of rows that count."""
    waiting: list[_Rows] = []
    num_waiting = 0

    def take(num: int) -> _Rows:
        nonlocal waiting, num_waiting
        joined = _Rows(*(np.concatenate(arrays) for arrays in zip(*waiting, strict=True)))
        waiting = [_Rows(*(array[num:] for array in joined))]
        num_waiting -= num
        return _Rows(*(array[:num] for array in joined))

    for piece in pieces:
        waiting.append(piece)
        num_waiting += len(piece.inputs_BT)
        while num_waiting >= batch_size:
            yield take(batch_size), batch_size
    if num_waiting:
        num = num_waiting
        # filled up with copies of the last row; another size would be compiled again
        yield _Rows(*(np.pad(a, ((0, batch_size - num), (0, 0)), "edge") for a in take(num))), num


def log_likelihoods(
    model: Any,
    params: dict,
    questions: Sequence[Question],
    *,
    mask: Mask,
    ids: Any,
    num_samples: int = 128,
    estimator: str = "exact_count",
    cfg_scale: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> list[Score]:
    """Returns the log-likelihood of each answer, in the order of the questions.

    A score depends on its question and the settings alone, to rounding: not on the other questions
    and not on batch_size. The same seed masks the same tokens for another model.

    Args:
        model: its hidden_fn and head_fn are called, see llada_jax.models.model.Model; the same
            object in every call, so that compiled programs are found again.
        mask: what the network's attention sees; a causal one makes the score exact.
        ids: mask_id, bos_id and pad_id, such as a tokenizer has.
        num_samples: sets of masked tokens drawn for each answer.
        estimator: a key of ESTIMATORS.
        cfg_scale: guidance w: un + (w + 1)(l - un), where the logits `un` saw the answer alone. 0
            switches it off, at half the cost.
        batch_size: rows at a time; rounded up to what the mesh splits evenly.
        mesh: of `params`; None computes where they are.

    Raises:
        UserError: an answer is empty, or a setting is out of range.
    """
    _check(questions, mask, num_samples=num_samples, estimator=estimator, cfg_scale=cfg_scale)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and 2**32 - 1.")
    check_number("batch_size=", batch_size, SIZE)
    check_number("seed=", seed, SEED)
    by_widths = defaultdict(list)
    for number, question in enumerate(questions):
        widths = tuple(bucket(len(part)) for part in question[:3])
        by_widths[widths].append(number)
    scores: dict[int, Score] = {}
    for widths, numbers in sorted(by_widths.items()):
        draws = {}

        def rows_of(numbers=numbers, widths=widths, draws=draws):
            for number in numbers:
                question = questions[number]
                if mask.causal:
                    yield _causal_rows(question, widths, ids)
                    continue
                draws[number] = draws_of(
                    question, estimator=estimator, num_samples=num_samples, seed=seed
                )
                yield _diffusion_rows(question, draws[number], widths, ids)

        most = len(numbers) * (1 if mask.causal else num_samples)
        size = min(batch_size, 1 << (most - 1).bit_length())
        nll, is_correct = _run(
            model,
            params,
            rows_of(),
            start=widths[0],
            batch_size=size,
            mask_id=0 if mask.causal else ids.mask_id,
            cfg_scale=cfg_scale,
            mesh=mesh,
        )
        first = 0
        for number in numbers:
            length = len(questions[number].answer)
            if mask.causal:
                scores[number] = Score(-float(nll[first]), 0.0, length, 1, bool(is_correct[first]))
                first += 1
                continue
            weight_N, is_exact = draws[number].weight_N, draws[number].is_exact
            last = first + len(weight_N)
            mean, error = mean_and_error(-weight_N * nll[first:last])
            scores[number] = Score(mean, 0.0 if is_exact else error, length, last - first, None)
            first = last
    return [scores[number] for number in range(len(questions))]


def _run(model, params, pieces, *, start, batch_size, mask_id, cfg_scale, mesh):
    """Returns the nll of all rows, float64, and whether all scored targets are the most likely."""
    placed = None
    if mesh is not None:
        ways = sharding.axis_size(mesh, "act_batch")
        batch_size = -(-batch_size // ways) * ways
        placed = NamedSharding(mesh, sharding.spec(("act_batch", None)))
    nll, is_correct = [], []
    in_flight = deque()

    def read():
        result, num = in_flight.popleft()
        nll_B, is_correct_B = jax.device_get(result)
        nll.append(nll_B[:num].astype(np.float64))
        is_correct.append(is_correct_B[:num])

    for rows, num in _batches(pieces, batch_size):
        if placed is not None:
            here = sharding.local_rows(placed, rows.inputs_BT.shape)
            local = {name: array[here] for name, array in rows._asdict().items()}
            rows = _Rows(**sharding.place_batch(local, here, batch_size, placed))
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            result = _nll_of_answers(
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


def _check(questions, mask: Mask, *, num_samples, estimator, cfg_scale) -> None:
    if estimator not in ESTIMATORS:
        raise UserError(
            f"estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}."
            f"{did_you_mean(estimator, ESTIMATORS)}"
        )
    check_number("mc_samples=", num_samples, DRAWS)
    if not 0 <= cfg_scale < math.inf:
        raise UserError(
            f"cfg_scale={cfg_scale} must be a finite number that is not negative; use 0 to switch "
            "guidance off."
        )
    if mask.has_blocks:
        raise UserError(
            "Answers are scored by models that see the whole row or only what came before; this "
            "model's attention has blocks."
        )
    for number, question in enumerate(questions):
        if not len(question.answer):
            raise UserError(f"Answer {number} is empty; a score needs at least one token.")
        if mask.causal and len(question.after):
            raise UserError(
                f"Answer {number} has text after it, which an autoregressive model cannot read; "
                "ask with a prompt alone."
            )
    if mask.causal and cfg_scale:
        raise UserError(
            f"cfg_scale={cfg_scale} guides masked diffusion models, and this one is "
            "autoregressive; leave it at 0."
        )


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> Question:
    """Returns a prompt and its answer as token ids.

    Both are encoded together and cut where the prompt alone would end, as in lm-evaluation-harness,
    because a tokenizer gives the answer other tokens at the start of a text. Spaces at the end of
    the prompt count as the answer's, to which a tokenizer joins them.

    Raises:
        UserError: no token is left for the answer.
    """
    bare = prompt.rstrip()
    spaces = prompt[len(bare) :]
    both, before = tokenizer.encode(bare + spaces + answer), tokenizer.encode(bare)
    if len(both) <= len(before):
        raise UserError(
            f"The answer {answer!r} adds no token to the prompt {prompt[-40:]!r}; give it text of "
            "its own."
        )
    return Question(tuple(both[: len(before)]), tuple(both[len(before) :]))
