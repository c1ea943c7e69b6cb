"""Scaling laws from finished runs: IsoFLOP parabolas, power laws of the optimum, a parametric fit.

All of them come with confidence intervals, because a handful of runs determines an exponent poorly.

The method is that of Hoffmann et al. (Chinchilla, arXiv 2203.15556, approaches 2 and 3), which SMDM
(arXiv 2410.18514) applied to masked diffusion. Compute is C = 6 N D with N parameters, without
embeddings and head as SMDM counts, and D tokens. Small models do much of their work in what that
leaves out, so that the optimum is also fitted against all floating-point operations.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student_t

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
    token. flops_per_token: of training, with head and attention; None counts 6 N alone.
    """

    parameters: float
    tokens: float
    loss: float
    flops_per_token: float | None = None

    @property
    def compute(self) -> float:
        """C = 6 N D, floating-point operations."""
        return 6 * self.parameters * self.tokens

    @property
    def flops(self) -> float:
        """F, all floating-point operations of the training."""
        return self.tokens * (self.flops_per_token or 6 * self.parameters)


class Estimate(NamedTuple):
    """A number with its 95% interval.

    low and high are nan where there are as many unknowns as runs, and so no residuals that say how
    noisy the runs are; infinite where the runs do not exclude any value on that side.
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
    flops_exponent: a in N_opt ~ F^a against all floating-point operations (fit_surface); None where
    the runs do not determine it.
    """

    budgets: list[Budget]
    laws: dict[str, PowerLaw]
    share_refitted: float
    flops_exponent: Estimate | None


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

    The interval is that of a studentised bootstrap (Davison and Hinkley, Bootstrap Methods and
    their Application, 1997, section 5.2.1): normal noise of the spread that the residuals show is
    added to the fitted curves, everything is fitted again, and what is drawn is the distance from
    the estimate in units of the standard error that the same sample gives. For an exponent that
    were linear in the losses this is the interval of Student's t. Percentiles of the exponents
    themselves take the spread of a handful of residuals for known, and named 95% they held the
    truth in 81 of 100 simulated ladders with three budgets of four sizes. Residuals are not drawn
    again, because those of a parabola through four points all have one shape.

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
    budgets = [_budget(group) for group in groups]
    surface = fit_surface([run for group in groups for run in group])
    used = [group for group, budget in zip(groups, budgets) if budget.is_bracketed]
    if len(used) < 2:
        return IsoFlop(budgets, {}, math.nan, surface)
    losses = [np.array([run.loss for run in group]) for group in used]
    fitted = [_basis(group) @ _parabola(group, loss) for group, loss in zip(used, losses)]
    freedom = sum(map(len, used)) - 3 * len(used)
    values, coefficients, scales = _exponents(used, losses)
    t_samples = {name: np.array([]) for name in values}
    share = math.nan
    if freedom > 0:
        residuals = np.concatenate([loss - fit for loss, fit in zip(losses, fitted)])
        spread = math.sqrt(residuals @ residuals / freedom)
        rng = np.random.default_rng(seed)
        redrawn = [
            fit[:, None] + spread * rng.standard_normal((len(fit), num_samples)) for fit in fitted
        ]
        again, _, scales_again = _exponents(used, redrawn)
        spread_again = np.sqrt(
            sum(
                np.sum((loss - _basis(group) @ _parabola(group, loss)) ** 2, axis=0)
                for group, loss in zip(used, redrawn)
            )
            / freedom
        )
        has_minima = np.all([_parabola(g, loss)[0] > 0 for g, loss in zip(used, redrawn)], axis=0)
        share = float(has_minima.mean())
        for name in values:
            with np.errstate(all="ignore"):
                t = (again[name] - values[name]) / (spread_again * scales_again[name])
            t_samples[name] = t[has_minima & np.isfinite(t)]
    laws = {}
    for name, value in values.items():
        low = high = math.nan
        if len(t_samples[name]):
            # the larger a sample overshot, the lower the truth may lie
            t_low, t_high = np.percentile(t_samples[name], INTERVAL)
            error = spread * scales[name]
            low, high = float(value - t_high * error), float(value - t_low * error)
        laws[name] = PowerLaw(coefficients[name], Estimate(float(value), low, high))
    return IsoFlop(budgets, laws, share, surface)


def _log_sizes(group: list[FinishedRun]) -> np.ndarray:
    """Returns log N around its mean, so that the parabola's coefficients are well determined."""
    logs = np.log([run.parameters for run in group])
    return logs - logs.mean()


def _basis(group: list[FinishedRun]) -> np.ndarray:
    """Returns the squares, values and ones of _log_sizes, [runs, 3]."""
    return np.vander(_log_sizes(group), 3)


def _parabola(group: list[FinishedRun], losses) -> np.ndarray:
    """Returns curvature, slope and level, [3]; [3, samples] of losses [runs, samples]."""
    return np.linalg.lstsq(_basis(group), losses, rcond=None)[0]


def _budget(group: list[FinishedRun]) -> Budget:
    sizes = np.array([run.parameters for run in group])
    compute = _compute(group)
    curvature, slope, level = _parabola(group, np.array([run.loss for run in group]))
    if curvature <= 0:
        return Budget(compute, group, math.nan, math.nan, math.nan, False)
    parameters = math.exp(np.log(sizes).mean() - slope / (2 * curvature))
    loss = float(level - slope**2 / (4 * curvature))
    return Budget(
        compute,
        group,
        parameters,
        compute / 6 / parameters,
        loss,
        bool(sizes.min() < parameters < sizes.max()),
    )


def _compute(group: list[FinishedRun]) -> float:
    """Returns the geometric mean of the runs' compute."""
    return math.exp(np.mean(np.log([run.compute for run in group])))


def _exponents(groups: list[list[FinishedRun]], losses: list[np.ndarray]) -> tuple[dict, ...]:
    """Returns three dicts by the name of a law: its exponent, its coefficient, and the standard
    error of the exponent for losses with a standard deviation of 1.

    They belong to straight lines through the optima in log-log. The standard error is that of the
    first order (the delta method).

    Args:
        losses: of each group, [runs], or [runs, samples] for exponents [samples].
    """
    log_compute = np.log([_compute(group) for group in groups])
    weights = (log_compute - log_compute.mean()) / np.sum((log_compute - log_compute.mean()) ** 2)
    logs: dict[str, list] = {"parameters": [], "tokens": [], "loss": []}
    variances: dict[str, list] = {name: [] for name in logs}
    # Some samples have no minimum; the caller drops them.
    with np.errstate(all="ignore"):
        for group, loss, log_c in zip(groups, losses, log_compute):
            c, b, a = _parabola(group, loss)
            covariance = np.linalg.inv(_basis(group).T @ _basis(group))
            log_n = np.log([run.parameters for run in group]).mean() - b / (2 * c)
            least = a - b**2 / (4 * c)
            zero, one = np.zeros_like(c), np.ones_like(c)
            of_size = np.stack([b / (2 * c**2), -1 / (2 * c), zero])
            of_loss = np.stack([b**2 / (4 * c**2), -b / (2 * c), one]) / least
            by_name = {
                "parameters": (log_n, of_size),
                "tokens": (log_c - math.log(6) - log_n, of_size),
                "loss": (np.log(least), of_loss),
            }
            for name, (log, gradient) in by_name.items():
                logs[name].append(log)
                variances[name].append(
                    np.einsum("i...,ij,j...->...", gradient, covariance, gradient)
                )
        values = {name: np.tensordot(weights, np.array(log), 1) for name, log in logs.items()}
        coefficients = {
            name: np.exp(np.mean(log, axis=0) - values[name] * log_compute.mean())
            for name, log in logs.items()
        }
        scales = {
            name: np.sqrt(np.tensordot(weights**2, np.array(variance), 1))
            for name, variance in variances.items()
        }
    return values, coefficients, scales


def fit_surface(runs: Sequence[FinishedRun]) -> Estimate | None:
    """Returns a in N_opt ~ F^a, with F all floating-point operations of the training.

    Budgets of equal 6 N D are not budgets of equal F, because the head and attention cost the small
    models more; so no parabola can be drawn at equal F. One quadratic surface of the loss in n =
    log N and f = log F needs no budgets: with the terms p n^2 + q n f, its minimum over n at fixed
    f moves as a = -q / 2p per unit of f. The interval is exact for normal noise around such a
    surface: that of a ratio of two coefficients (Fieller, 1954), all the a for which Student's t
    does not tell q + 2 a p from 0.

    None: there are too few runs for the six coefficients, or they have no minimum in n.
    """
    n, f = np.log([run.parameters for run in runs]), np.log([run.flops for run in runs])
    n, f = n - n.mean(), f - f.mean()
    basis = np.stack([n * n, n * f, n, f, f * f, np.ones_like(n)], axis=1)
    if np.linalg.matrix_rank(basis) < basis.shape[1]:
        return None
    losses = np.array([run.loss for run in runs])
    p, q, *_ = coefficients = np.linalg.lstsq(basis, losses, rcond=None)[0]
    if p <= 0:
        return None
    value, freedom = float(-q / (2 * p)), len(runs) - basis.shape[1]
    if freedom == 0:
        return Estimate(value, math.nan, math.nan)
    residuals = losses - basis @ coefficients
    covariance = np.linalg.inv(basis.T @ basis)[:2, :2] * (residuals @ residuals / freedom)
    t2 = float(student_t.ppf(INTERVAL[1] / 100, freedom)) ** 2
    # (q + 2 a p)^2 <= t^2 (var q + 4 a cov + 4 a^2 var p), a quadratic in a
    square = 4 * (p * p - t2 * covariance[0, 0])
    if square <= 0:
        # p may be 0: no a can be excluded.
        return Estimate(value, -math.inf, math.inf)
    linear = 4 * (p * q - t2 * covariance[0, 1])
    constant = q * q - t2 * covariance[1, 1]
    half = math.sqrt(max(linear**2 - 4 * square * constant, 0.0))
    return Estimate(
        value, float((-linear - half) / 2 / square), float((half - linear) / 2 / square)
    )


# ---- approach 3: parametric fit


def fit_parametric(
    runs: Sequence[FinishedRun], *, num_samples: int = 200, seed: int = 0
) -> Parametric:
    """Fits L(N, D) = E + A / N**alpha + B / D**beta to all runs, by the Huber loss of log L.

    The surface has several local minima, so the fit starts from 18 points and keeps the best.
    The intervals are percentiles of a bootstrap of the residuals, which are first widened so that
    the intervals of a linear fit would be those of Student's t.

    Args:
        num_samples: how many bootstrap samples of the residuals to draw. seed: of the draws.

    Raises:
        UserError: fewer than 6 runs, or fewer than three sizes or token counts, for 5 unknowns.
    """
    N, D, L = np.array([run[:3] for run in runs], float).reshape(-1, 3).T
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
    freedom = len(runs) - 5
    widened = student_t.ppf(INTERVAL[1] / 100, freedom) / student_t.ppf(INTERVAL[1] / 100, np.inf)
    drawable = (z - fitted) * math.sqrt(len(runs) / freedom) * widened
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
    if isoflop.flops_exponent is not None:
        exponent = isoflop.flops_exponent
        lines.append(
            f"  N_opt ~ F^{exponent.value:.3f}{_interval(exponent)}  F: all FLOPs, with head and "
            "attention; one surface"
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
