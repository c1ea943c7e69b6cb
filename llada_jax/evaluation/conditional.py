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

"confidence_order" is not an estimate of a bound (iLLaDA, arXiv 2606.25331): the answer is masked
whole, its true tokens are revealed one at a time, always the likeliest of them, and their
log-likelihoods are summed. The order is chosen with the answer in sight, so the probabilities of
all answers may add up to more than 1. It has no noise and takes one pass per token.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llada_jax.errors import UserError, did_you_mean
from llada_jax.evaluation.answer_rows import (
    Question,
    bucket,
    causal_rows,
    diffusion_rows,
    nll_in_confidence_order,
    nll_of_answers,
    noise_of,
    run,
)
from llada_jax.masks import Mask
from llada_jax.ranges import DRAWS, SIZE, check_number
from llada_jax.samplers.settings import check_strengths


class Score(NamedTuple):
    """The log-likelihood of one answer.

    log_likelihood: in nats, summed over the answer; a lower bound in expectation for masked
        diffusion, unless the estimator is "confidence_order". standard_error: of the Monte Carlo; 0
        where nothing was drawn, nan for one sample. num_tokens: of the answer. num_passes: rows
        that went through the network.
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


def confidence_order(rng: np.random.Generator, length: int, num_samples: int) -> Draws:
    """Masks the whole answer once; its tokens are then revealed in the order of their likelihood
    (iLLaDA, arXiv 2606.25331).
    """
    del rng, num_samples
    return Draws(np.ones((1, length), bool), np.ones(1), is_exact=True)


ESTIMATORS = {
    "exact_count": exact_count,
    "uniform_time": uniform_time,
    "confidence_order": confidence_order,
}


def _rng(seed: int, question: Question) -> np.random.Generator:
    noise = question.noise
    if noise is None:
        # -1 marks the place of the answer.
        noise = noise_of([*question.before, -1, *question.after])
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
    is_ordered = estimator == "confidence_order" and not mask.causal
    by_widths = defaultdict(list)
    for number, question in enumerate(questions):
        widths = tuple(bucket(len(part)) for part in question[:3])
        by_widths[widths].append(number)
    scores: dict[int, Score] = {}
    for widths, numbers in sorted(by_widths.items()):
        draws = {}
        if not mask.causal:
            settings: dict[str, Any] = dict(estimator=estimator, num_samples=num_samples, seed=seed)
            draws = {number: draws_of(questions[number], **settings) for number in numbers}

        def rows_of(numbers=numbers, widths=widths, draws=draws):
            for number in numbers:
                question = questions[number]
                if mask.causal:
                    yield causal_rows(question, widths, ids)
                else:
                    yield diffusion_rows(question, draws[number].is_masked_NL, widths, ids)

        num_rows = sum(len(drawn.weight_N) for drawn in draws.values()) or len(numbers)
        size = min(batch_size, 1 << (num_rows - 1).bit_length())
        nll, is_correct = run(
            nll_in_confidence_order if is_ordered else nll_of_answers,
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
            num_passes = length if is_ordered else last - first
            scores[number] = Score(mean, 0.0 if is_exact else error, length, num_passes, None)
            first = last
    return [scores[number] for number in range(len(questions))]


def _check(questions, mask: Mask, *, num_samples, estimator, cfg_scale) -> None:
    if estimator not in ESTIMATORS:
        raise UserError(
            f"estimator={estimator!r} must be one of {', '.join(ESTIMATORS)}."
            f"{did_you_mean(estimator, ESTIMATORS)}"
        )
    check_number("mc_samples=", num_samples, DRAWS)
    check_strengths(cfg_scale=cfg_scale)
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
