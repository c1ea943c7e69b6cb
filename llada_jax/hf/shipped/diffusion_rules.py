"""The rules of the sampler in diffusion_sampler.py: what a pass proposes, which proposals it keeps,
and which tokens go back to the mask.

Needs PyTorch only. Names carry shapes: B rows, T positions of the current block, V vocabulary. No
row sees another. The sources of the rules stand next to them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(like_BT: Tensor, generator) -> Tensor:
    """Returns draws from U(0, 1) in the shape of another array, float32."""
    return torch.rand(like_BT.shape, generator=generator, device=like_BT.device)


def ranks(score_BT: Tensor, *, descending: bool) -> Tensor:
    """Returns the place of each position in its row; ties go to the left."""
    return score_BT.argsort(dim=1, descending=descending, stable=True).argsort(dim=1)


def is_among(tokens_BT: Tensor, ids: list[int]) -> Tensor:
    return torch.isin(tokens_BT, torch.tensor(ids, device=tokens_BT.device))


# ---- which tokens come first: a confidence for every position, the greatest first


def low_confidence(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """The probability of the chosen token: the least certain positions stay masked (LLaDA,
    algorithm 5).
    """
    return logits_BTV.softmax(-1).gather(-1, choices_BT[..., None])[..., 0]


def random_order(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """A uniform draw: positions are revealed in random order (LLaDA, algorithm 4)."""
    return uniform(choices_BT, generator)


def entropies(logits_BTV: Tensor) -> Tensor:
    """Returns the entropy of softmax(logits) in nats; logits may be -inf."""
    return torch.special.entr(logits_BTV.softmax(-1)).sum(-1)


def low_entropy(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """Positions where few tokens are possible come first."""
    return -entropies(logits_BTV)


def margin(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """The probability of the most likely token less that of the second (arXiv 2502.06768)."""
    first_BT, second_BT = logits_BTV.softmax(-1).topk(2).values.unbind(-1)
    return first_BT - second_BT


REMASKING = {
    "low_confidence": low_confidence,
    "random": random_order,
    "entropy": low_entropy,
    "margin": margin,
}

# ---- how many tokens a pass keeps. Rules see the hidden positions sorted, the surest first: c are
# the probabilities of the proposals, h the entropies in nats. They return, for n = 1, 2, ... in a
# row, whether the first n may be kept.


def threshold(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """c(n) > amount (Fast-dLLM, arXiv 2505.22618)."""
    return c_BT > amount


def factor(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """(n + 1)(1 - c(n)) < amount (Fast-dLLM)."""
    n_T = torch.arange(1, c_BT.shape[1] + 1, device=c_BT.device)
    return (n_T + 1) * (1 - c_BT) < amount


def frechet(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """max(0, c(1) + ... + c(n) - (n - 1)) - (1 - c(n)) > amount (arXiv 2606.02955), from sums of
    doubts: those of probabilities would round them away.
    """
    doubt_BT = 1 - c_BT
    return (1 - doubt_BT.cumsum(1)).clamp(min=0) - doubt_BT > amount


def entropy(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """The entropies of the first n, without the largest of them, sum to no more than the amount
    (arXiv 2505.24857).
    """
    return F.pad(h_BT[:, :-1], (1, 0)).cumsum(1) <= amount


SCHEDULE = "schedule"
# name -> what it asks, its usual amount, and the greatest that there can be
COMMIT = {
    "threshold": (threshold, 0.9, 1.0),
    "factor": (factor, 1.0, 1e6),
    "frechet": (frechet, 0.25, 1.0),
    "entropy": (entropy, 0.1, 1e6),
}
EOS = ("free", "never", "last")
CACHES = ("none", "prefix", "dual")


def parse_rule(
    argument: str, text: str, usual: dict[str, float], *, otherwise: str
) -> tuple[str, float]:
    """Returns the rule that NAME or NAME=AMOUNT names, and its amount: the usual one unless given,
    NaN for what is not a number. ValueError for a name that is neither in `usual` nor `otherwise`.
    """
    name, equals, amount = text.partition("=")
    if name not in usual:
        names = ", ".join([otherwise, *usual])
        raise ValueError(
            f"{argument}={text!r} is unknown; use one of {names}, as NAME or NAME=AMOUNT."
        )
    try:
        return name, float(amount) if equals else usual[name]
    except ValueError:
        return name, float("nan")


def parse_commit(text: str) -> tuple[str, float]:
    """Returns the rule that NAME or NAME=AMOUNT names, and its amount; ValueError for others."""
    if text == SCHEDULE:
        return SCHEDULE, 0.0
    usual = {name: default for name, (_, default, _) in COMMIT.items()}
    name, number = parse_rule("commit", text, usual, otherwise=SCHEDULE)
    _, default, greatest = COMMIT[name]
    if not 0 <= number <= greatest:
        raise ValueError(
            f"commit={text!r}: the amount of {name} must be a number between 0 and {greatest:g}; "
            f"the usual one is {name}={default:g}."
        )
    return name, number


def count_sure(
    name: str, amount: float, c_BT: Tensor, h_BT: Tensor, is_hidden_BT: Tensor
) -> Tensor:
    """Returns how many tokens a rule keeps in each row, [B, 1]; 0 where none is sure."""
    c_BT = c_BT.masked_fill(~is_hidden_BT, -torch.inf).sort(1, descending=True).values
    h_BT = h_BT.masked_fill(~is_hidden_BT, torch.inf).sort(1).values
    n_T = torch.arange(1, c_BT.shape[1] + 1, device=c_BT.device)
    holds_BT = COMMIT[name][0](c_BT, h_BT, amount) & (n_T <= is_hidden_BT.sum(1, keepdim=True))
    return (n_T * holds_BT).amax(1, keepdim=True)


# ---- which tokens are proposed


def keep_likely(logits_BTV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Returns the logits with the unlikely tokens at -inf: first all but the `top_k` most likely (0
    keeps all), then all that the most likely tokens with a probability of at least `top_p`
    together do not need (nucleus sampling, arXiv 1904.09751). The most likely token is always kept,
    and so are tokens that tie with the last one kept.
    """
    V = logits_BTV.shape[-1]
    sorted_BTV = logits_BTV.sort(-1, descending=True).values
    is_kept_V = torch.arange(V, device=logits_BTV.device) < (top_k or V)
    sorted_BTV = sorted_BTV.masked_fill(~is_kept_V, -torch.inf)
    is_kept_BTV = is_kept_V.expand_as(sorted_BTV)
    if top_p < 1:
        p_BTV = sorted_BTV.softmax(-1)
        is_kept_BTV = is_kept_BTV & (p_BTV.cumsum(-1) - p_BTV < top_p)
    lowest_BT1 = sorted_BTV.masked_fill(~is_kept_BTV, torch.inf).amin(-1, keepdim=True)
    return logits_BTV.masked_fill(logits_BTV < lowest_BT1, -torch.inf)


def pick_tokens(
    logits_BTV: Tensor, temperature: float, generator, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draws from softmax(logits / temperature) by the Gumbel-max trick; the most likely token at
    temperature 0.

    Float64, because the tail of a float32 draw is too short for a large vocabulary (arXiv
    2409.02908).
    """
    if temperature > 0:
        if top_k or top_p < 1:
            kept_BTV = keep_likely(logits_BTV / temperature, top_k, top_p)
            logits_BTV = logits_BTV.masked_fill(kept_BTV == -torch.inf, -torch.inf)
        noise_BTV = (
            torch.empty_like(logits_BTV, dtype=torch.float64)
            .exponential_(generator=generator)
            .log()
        )
        logits_BTV = logits_BTV - temperature * noise_BTV
    return logits_BTV.argmax(-1)


# ---- which tokens go back to the mask, although they were kept: of the current block, and never
# more than the schedule has places for. ReMDM (arXiv 2503.00307) takes back at random and reveals
# as many tokens more. WINO (arXiv 2507.18578) keeps many tokens on little evidence and verifies
# them with a shadow of the block, all masks, each of which sees all but the token in its place.

NONE, WINO, LOOP = "none", "wino", "remdm-loop"
# name -> its usual amount, and what that is
REVISE = {
    "remdm-cap": (0.008, "the greatest chance of a token to be masked again in a step"),
    "remdm-rescale": (0.015, "the share of the greatest chance that the schedule allows"),
    LOOP: (0.02, "the chance of a token to be masked again in a step of the loop"),
    WINO: (0.9, "the probability below which a masked token fails"),
}
# The loop of ReMDM, as shares of the steps of a block, and what is revealed before it.
LOOP_BEGINS, LOOP_ENDS, LOOP_REVEALED = 0.45, 0.95, 0.9
# WINO keeps at most this share of what is hidden, within these limits.
DRAFT_SHARE, LEAST_DRAFT, MOST_DRAFT = 0.7, 5, 20


def parse_revise(text: str) -> tuple[str, float]:
    """Returns the rule that NAME or NAME=AMOUNT names, and its amount; ValueError for others."""
    if text == NONE:
        return NONE, 0.0
    usual = {name: default for name, (default, _) in REVISE.items()}
    name, number = parse_rule("revise", text, usual, otherwise=NONE)
    default, meaning = REVISE[name]
    if not 0 <= number <= 1:
        raise ValueError(
            f"revise={text!r}: the amount of {name} is {meaning}, between 0 and 1; the usual one "
            f"is {name}={default:g}."
        )
    return name, number


def loop_limits(steps: int) -> tuple[int, int]:
    """Returns the first step of a block that is in ReMDM's loop, and the first behind it."""
    begin, end = (int(share_of(steps, share)) for share in (LOOP_BEGINS, LOOP_ENDS))
    return begin, end


def share_of(number: int, share: float) -> Tensor:
    """Returns a share of a number in float32, in which llada_jax rounds it too."""
    return torch.tensor(share, dtype=torch.float32) * number


def loop_count(hidden_B1: Tensor, num_tokens: int, step: int, steps: int) -> Tensor:
    """Returns how many tokens of each row a step of ReMDM's loop reveals for good, [B, 1].

    Args:
        hidden_B1: tokens of the block that are hidden, of `num_tokens`.
        step, steps: of the block, counted from 0.
    """
    begin, end = loop_limits(steps)
    if step >= end:
        return -(-hidden_B1 // (steps - step))
    if step >= begin:
        return torch.zeros_like(hidden_B1)
    num_held = int(share_of(num_tokens, 1 - LOOP_REVEALED).round())
    return -(-(hidden_B1 - num_held).clamp(min=0) // (begin - step))


def lowest(score_BT: Tensor, where_BT: Tensor, most_B1: Tensor) -> Tensor:
    """Returns the positions of `where_BT` with the lowest scores, no more than `most_B1` a row."""
    score_BT = score_BT.masked_fill(~where_BT, torch.inf)
    return where_BT & (ranks(score_BT, descending=False) < most_B1)


def taken_back_by_chance(
    name: str,
    amount: float,
    is_kept_BT: Tensor,
    num_hidden_B1: Tensor,
    generator,
    *,
    step: int,
    steps: int,
) -> Tensor:
    """Returns the tokens that ReMDM masks again, bool [B, T].

    Args:
        is_kept_BT: the tokens of the block that were revealed before this step.
        num_hidden_B1: tokens that the schedule leaves hidden after this step. No more are taken
            back than it has places for, which is what bounds the chance (section 4, equation 10,
            with counts in place of their expectations).
        step, steps: of the block, counted from 0.
    """
    draw_BT = uniform(is_kept_BT, generator)
    if name == LOOP:
        begin, end = loop_limits(steps)
        chance_B1 = torch.full_like(draw_BT[:, :1], amount if begin <= step < end else 0.0)
    else:
        greatest_B1 = (num_hidden_B1 / is_kept_BT.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)
        is_cap = name == "remdm-cap"
        chance_B1 = greatest_B1.clamp(max=amount) if is_cap else amount * greatest_B1
    return lowest(draw_BT, is_kept_BT & (draw_BT < chance_B1), num_hidden_B1)


def most_drafted(num_hidden_B1: Tensor) -> Tensor:
    """Returns the most tokens that a step of WINO keeps, [B, 1]."""
    return (DRAFT_SHARE * num_hidden_B1.float()).floor().long().clamp(LEAST_DRAFT, MOST_DRAFT)


def taken_back_by_shadow(
    amount: float,
    is_kept_BT: Tensor,
    probability_BT: Tensor,
    num_drafted_B1: Tensor,
    num_drafted_before_B1: Tensor,
    *,
    is_last: bool,
) -> Tensor:
    """Returns the tokens that WINO masks again, bool [B, T].

    Args:
        is_kept_BT: the tokens of the block that were revealed before this step.
        probability_BT: of these tokens, where the network sees a mask in their place.
        num_drafted_B1, num_drafted_before_B1: tokens that this step and the one before it keep;
            fewer than the latter are taken back, so that every block ends.
        is_last: whether the schedule has no further step.
    """
    most_B1 = (num_drafted_before_B1 - 1).masked_fill((num_drafted_B1 <= 1) | is_last, 0)
    return lowest(probability_BT, is_kept_BT & (probability_BT < amount), most_B1)
