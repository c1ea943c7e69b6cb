"""Scaling laws from finished runs: IsoFLOP parabolas, power laws of the optimum, a parametric fit.

All of them come with confidence intervals, because a handful of runs determines an exponent poorly.

The method is that of Hoffmann et al. (Chinchilla, arXiv 2203.15556, approaches 2 and 3), which SMDM
(arXiv 2410.18514) applied to masked diffusion. Compute is C = 6 N D with N parameters, without
embeddings and head as SMDM counts, and D tokens.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from llada_jax.errors import UserError
from llada_jax.units import format_count

# Runs belong to one budget while the next larger compute is less than this factor away.
SAME_BUDGET = 1.1
# Of alpha and beta in the parametric fit; published ones are below 1.
MAX_EXPONENT = 3.0
# Of the residual of log loss (Chinchilla, section 3.3).
HUBER_DELTA = 1e-3
# Percentiles of the bootstrap that are reported.
INTERVAL = (2.5, 97.5)


class FinishedRun(NamedTuple):
    """One run, as the fits see it.

    parameters: N, without embeddings and head; tokens: D; loss: held-out nats per
    token.
    """

    parameters: float
    tokens: float
    loss: float

    @property
    def compute(self) -> float:
        """C = 6 N D, floating-point operations."""
        return 6 * self.parameters * self.tokens


class Estimate(NamedTuple):
    """A number with its 95% bootstrap interval.

    low and high are nan where there are as many unknowns as runs, and so no residuals to draw from.
    """

    value: float
    low: float
    high: float


class Budget(NamedTuple):
    """The parabola through the runs of one compute budget; optima are nan where it opens downwards.

    is_bracketed: its minimum lies between the smallest and the largest model that was trained.
    """

    compute: float
    runs: list[FinishedRun]
    parameters: float
    tokens: float
    loss: float
    is_bracketed: bool


class PowerLaw(NamedTuple):
    """y = coefficient * C**exponent."""

    coefficient: float
    exponent: Estimate


class IsoFlop(NamedTuple):
    """Approach 2: a parabola per budget, and the power laws of their minima.

    laws: of "parameters" (N_opt), "tokens" (D_opt) and "loss" over the bracketed budgets; {} with
    fewer than two of them. share_refitted: the share of the bootstrap samples that had a minimum in
    every budget; the others say nothing and are dropped, which makes the intervals too narrow.
    """

    budgets: list[Budget]
    laws: dict[str, PowerLaw]
    share_refitted: float


class Parametric(NamedTuple):
    """Approach 3: L(N, D) = E + A / N**alpha + B / D**beta.

    a and b: the exponents of N_opt and D_opt in C that follow from it.
    """

    E: Estimate
    A: Estimate
    B: Estimate
    alpha: Estimate
    beta: Estimate
    a: Estimate
    b: Estimate

    def loss(self, parameters, tokens):
        """Returns L(N, D), nats per token."""
        N, D = np.asarray(parameters, float), np.asarray(tokens, float)
        return (
            self.E.value + self.A.value * N**-self.alpha.value + self.B.value * D**-self.beta.value
        )

    def optimum(self, compute: float) -> tuple[float, float]:
        """Returns (N, D) of the least loss at C = 6 N D (Chinchilla, equation 4)."""
        alpha, beta = self.alpha.value, self.beta.value
        G = (alpha * self.A.value / (beta * self.B.value)) ** (1 / (alpha + beta))
        parameters = G * (compute / 6) ** self.a.value
        return parameters, compute / 6 / parameters


# ---- approach 2: IsoFLOP


def budgets_of(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Returns the runs grouped by compute, smallest budget and smallest model first."""
    groups = []
    for run in sorted(runs, key=lambda run: run.compute):
        if not groups or run.compute > SAME_BUDGET * groups[-1][-1].compute:
            groups.append([])
        groups[-1].append(run)
    return [sorted(group) for group in groups]


def fit_isoflop(runs: Sequence[FinishedRun], *, num_samples: int = 1000, seed: int = 0) -> IsoFlop:
    """Fits loss = parabola in log N for each budget, then the power laws of the optima.

    The interval is that of a residual bootstrap: the residuals of all parabolas are drawn again
    onto the fitted curves, and everything is fitted again. They are scaled up first, because a
    parabola with three coefficients fits its few points too well. Drawing runs instead of residuals
    would often leave a budget with fewer than three sizes.

    Args:
        num_samples: how many bootstrap samples to draw. seed: of the draws.

    Raises:
        UserError: no budget has three sizes, which a parabola needs.
    """
    groups = [group for group in budgets_of(runs) if len({run.parameters for run in group}) >= 3]
    if not groups:
        raise UserError(
            f"{len(runs)} finished runs hold no compute budget (6 N D) with three sizes of model; "
            "a parabola needs three."
        )
    budgets = [_budget(group, [run.loss for run in group]) for group in groups]
    used = [group for group, budget in zip(groups, budgets) if budget.is_bracketed]
    if len(used) < 2:
        return IsoFlop(budgets, {}, math.nan)
    fitted = [
        np.polyval(_parabola(group, [run.loss for run in group]), _log_sizes(group))
        for group in used
    ]
    residuals = np.concatenate(
        [[run.loss for run in group] - fit for group, fit in zip(used, fitted)]
    )
    freedom = len(residuals) - 3 * len(used)
    samples = []
    if freedom > 0:
        rng = np.random.default_rng(seed)
        drawable = residuals * math.sqrt(len(residuals) / freedom)
        for _ in range(num_samples):
            redrawn = [
                _budget(group, fit + rng.choice(drawable, len(group)))
                for group, fit in zip(used, fitted)
            ]
            if all(math.isfinite(budget.parameters) for budget in redrawn):
                samples.append(_exponents(redrawn))
    values = _exponents([budget for budget in budgets if budget.is_bracketed])
    laws = {
        name: PowerLaw(coefficient, _estimate(exponent, [sample[name][1] for sample in samples]))
        for name, (coefficient, exponent) in values.items()
    }
    return IsoFlop(budgets, laws, len(samples) / num_samples if freedom > 0 else math.nan)


def _log_sizes(group: list[FinishedRun]) -> np.ndarray:
    """Returns log N around its mean, so that the parabola's coefficients are well determined."""
    logs = np.log([run.parameters for run in group])
    return logs - logs.mean()


def _parabola(group: list[FinishedRun], losses) -> np.ndarray:
    return np.polyfit(_log_sizes(group), losses, 2)


def _budget(group: list[FinishedRun], losses) -> Budget:
    sizes = np.array([run.parameters for run in group])
    compute = math.exp(np.mean(np.log([run.compute for run in group])))
    curvature, slope, level = _parabola(group, losses)
    if curvature <= 0:
        return Budget(compute, group, math.nan, math.nan, math.nan, False)
    parameters = math.exp(np.log(sizes).mean() - slope / (2 * curvature))
    loss = level - slope**2 / (4 * curvature)
    return Budget(
        compute,
        group,
        parameters,
        compute / 6 / parameters,
        loss,
        bool(sizes.min() < parameters < sizes.max()),
    )


def _exponents(budgets: list[Budget]) -> dict[str, tuple[float, float]]:
    """Returns {name: (coefficient, exponent)} of straight lines through the optima in log-log."""
    log_compute = np.log([budget.compute for budget in budgets])
    laws = {}
    for name in ("parameters", "tokens", "loss"):
        slope, intercept = np.polyfit(
            log_compute, np.log([getattr(budget, name) for budget in budgets]), 1
        )
        laws[name] = (math.exp(intercept), float(slope))
    return laws


# ---- approach 3: parametric fit


def fit_parametric(
    runs: Sequence[FinishedRun], *, num_samples: int = 200, seed: int = 0
) -> Parametric:
    """Fits L(N, D) = E + A / N**alpha + B / D**beta to all runs, by the Huber loss of log L.

    The surface has several local minima, so the fit starts from 18 points and keeps the best.

    Args:
        num_samples: how many bootstrap samples of the residuals to draw. seed: of the draws.

    Raises:
        UserError: fewer than 6 runs, or fewer than three sizes or token counts, for 5 unknowns.
    """
    N, D, L = np.array(runs, float).reshape(-1, 3).T
    if len(runs) < 6 or len(set(N)) < 3 or len(set(D)) < 3:
        raise UserError(
            f"{len(runs)} finished runs of {len(set(N))} sizes and {len(set(D))} token counts "
            "cannot determine the five numbers of L(N, D); train at least 6 runs of 3 sizes and 3 "
            "token counts."
        )
    # log N and log D around their means: otherwise A and alpha are almost one direction, and the
    # solver stops early.
    x, y, z = np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean(), np.log(L)
    starts = [
        (np.log(L.mean() * (1 - share) / 2),) * 2 + (np.log(L.min() * share), alpha, beta)
        for share, alpha, beta in itertools.product((0.3, 0.8), (0.15, 0.4, 1.0), (0.15, 0.4, 1.0))
    ]
    best = min((_minimum(x, y, z, start) for start in starts), key=lambda fit: fit.cost).x
    fitted = _log_loss(best, x, y)[0]
    drawable = (z - fitted) * math.sqrt(len(runs) / (len(runs) - 5))
    rng = np.random.default_rng(seed)
    samples = [
        _minimum(x, y, fitted + rng.choice(drawable, len(runs)), best).x for _ in range(num_samples)
    ]
    means = np.log(N).mean(), np.log(D).mean()
    rows = np.array([_readable(sample, *means) for sample in samples])
    return Parametric(
        *(_estimate(value, rows[:, i]) for i, value in enumerate(_readable(best, *means)))
    )


def _log_loss(theta, x, y) -> tuple[np.ndarray, np.ndarray]:
    """Returns log L [runs], and the shares [3, runs] of the three terms in L.

    theta = (a, b, e, alpha, beta), where a, b and e are the logarithms of the three terms at x = y
    = 0, so that no term can become negative.
    """
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])
    top = terms.max(axis=0)
    log_loss = top + np.log(np.exp(terms - top).sum(axis=0))
    return log_loss, np.exp(terms - log_loss)


def _minimum(x, y, z, start):
    def residual(theta):
        return _log_loss(theta, x, y)[0] - z

    def jacobian(theta):
        shares = _log_loss(theta, x, y)[1]
        return np.stack([*shares, -shares[0] * x, -shares[1] * y], axis=1)

    # The terms may vanish but not explode.
    bounds = ([-30] * 3 + [0] * 2, [30] * 3 + [MAX_EXPONENT] * 2)
    return least_squares(
        residual,
        start,
        jacobian,
        bounds,
        loss="huber",
        f_scale=HUBER_DELTA,
        x_scale="jac",
        max_nfev=100,
    )


def _readable(theta, mean_log_n: float, mean_log_d: float) -> tuple[float, ...]:
    """Returns (E, A, B, alpha, beta, a, b) of the solver's variables."""
    a, b, e, alpha, beta = theta
    total = alpha + beta
    shares = (beta / total, alpha / total) if total > 0 else (math.nan, math.nan)
    return (
        math.exp(e),
        math.exp(a + alpha * mean_log_n),
        math.exp(b + beta * mean_log_d),
        alpha,
        beta,
        *shares,
    )


def _estimate(value: float, samples) -> Estimate:
    finite = [sample for sample in samples if math.isfinite(sample)]
    low, high = np.percentile(finite, INTERVAL) if finite else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high))


# ---- as text


def fit_lines(isoflop: IsoFlop, parametric: Parametric | None, reason: str) -> list[str]:
    """Returns the fits with their 95% intervals, and what they cannot determine.

    Args:
        reason: why there is no parametric fit.
    """
    lines = [
        "IsoFLOP: one parabola of the held-out nats/token in log N for each budget C = 6 N D",
        "",
    ]
    lines.append(f"  {'C':>9}{'runs':>6}{'N_opt':>10}{'D_opt':>10}{'D/N':>8}{'loss':>9}")
    for budget in isoflop.budgets:
        head = f"  {budget.compute:>9.2e}{len(budget.runs):>6}"
        if math.isnan(budget.parameters):
            lines.append(f"{head}  no minimum: the parabola opens downwards")
            continue
        N, D = format_count(budget.parameters), format_count(budget.tokens)
        note = "" if budget.is_bracketed else "  outside the sizes trained: not used"
        ratio = budget.tokens / budget.parameters
        lines.append(f"{head}{N:>10}{D:>10}{ratio:>8.1f}{budget.loss:>9.4f}{note}")
    lines.append("")
    if not isoflop.laws:
        lines.append(
            "  fewer than two budgets have their minimum inside the sizes trained: no power law"
        )
    for name, symbol in (("parameters", "N_opt"), ("tokens", "D_opt"), ("loss", "loss")):
        if name in isoflop.laws:
            law = isoflop.laws[name]
            lines.append(
                f"  {symbol:<5} = {law.coefficient:.3g} * "
                f"C^{law.exponent.value:.3f}{_interval(law.exponent)}"
            )
    if isoflop.share_refitted < 0.95:
        lines.append(
            f"  only {isoflop.share_refitted:.0%} of the bootstrap had all minima: the intervals "
            "are too narrow"
        )
    lines += [
        "",
        "parametric: L(N, D) = E + A / N^alpha + B / D^beta, all runs, Huber loss of log L",
    ]
    if parametric is None:
        return [*lines, f"  {reason}"]
    for name, estimate in parametric._asdict().items():
        meaning = {"a": "  N_opt ~ C^a", "b": "  D_opt ~ C^b"}.get(name, "")
        lines.append(f"  {name:<6}{estimate.value:.4g}{_interval(estimate)}{meaning}")
    if not all(
        0.01 < exponent.value < 0.99 * MAX_EXPONENT
        for exponent in (parametric.alpha, parametric.beta)
    ):
        lines.append(
            "  an exponent went to the end of its range: these runs do not determine this law"
        )
    return lines


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return " (no interval: as many unknowns as runs)"
    return f" ({estimate.low:.3g} to {estimate.high:.3g})"
