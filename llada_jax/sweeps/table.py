"""The results of a sweep for people: the table in the terminal, and the curves in a file."""

import math

import numpy as np

from llada_jax.errors import UserError, require
from llada_jax.sweeps.comparison import ranked
from llada_jax.sweeps.results import Result

_BLOCKS = "▁▂▃▄▅▆▇█"

# A knob with more values than this, as Optuna draws them, is shown by its effect alone.
_MAX_VALUES = 10


def progress_of(result: Result) -> str:
    """Returns e.g. "complete", "missing", "120/400", "failed 120/400"."""
    if result.state in ("complete", "missing", "unreadable"):
        return result.state
    steps = f"{result.step}/{result.num_steps}"
    return steps if result.state == "partial" else f"{result.state} {steps}"


def table_lines(results: list[Result], effects: list[dict], *, label) -> list[str]:
    """Returns the ranking as text, with the training curves as blocks, and the effects of the
    knobs.

    Args:
        effects: from llada_jax.sweeps.comparison.effects. label: result -> what it changes.
    """
    values = [bits for result in results for _, bits in result.train_curve if math.isfinite(bits)]
    # All curves share one scale. Its top leaves out the first steps, whose losses are so much
    # higher that the rest of every curve would be flat.
    low, high = np.quantile(values or [0.0, 1.0], [0, 0.95])
    lines = [f"{'rank':>4}  {'run':<5}{'bits/byte':<19}{'training':<18}{'state':<18}changes"]
    for rank, result in enumerate(ranked(results), start=1):
        is_known = not math.isnan(result.bits_per_byte)
        bits = f"{result.bits_per_byte:.4f}" if is_known else "-"
        bits += "" if math.isnan(result.standard_error) else f" +- {result.standard_error:.4f}"
        place = rank if is_known and result.state == "complete" else "-"
        curve = sparkline(result.train_curve, low=low, high=high)
        line = f"{place:>4}  {result.index:03d}  {bits:<19}{curve:<18}{progress_of(result):<18}"
        lines.append(f"{line}{label(result)}".rstrip())
    if effects:
        lines += [
            "",
            "mean held-out bits/byte of the complete runs by value, the strongest knob first",
        ]
    shown = set()
    for effect in effects:
        # Knobs that move together have the same effect, which is shown once.
        if effect["knob"] not in shown:
            shown |= {effect["knob"], *effect["moves_with"]}
            lines += _effect_lines(effect)
    return lines


def _effect_lines(effect: dict) -> list[str]:
    notes = [f"moves {effect['spread']:.4f}"]
    if effect["rank_correlation"] is not None:
        notes.append(f"rank correlation {effect['rank_correlation']:+.2f}")
    if effect["moves_with"]:
        notes.append(f"cannot be told apart from {', '.join(effect['moves_with'])}")
    if not effect["is_balanced"]:
        notes.append("other knobs differ between its values, too")
    lines = [f"{effect['knob']}: {'; '.join(notes)}"]
    if len(effect["values"]) <= _MAX_VALUES:
        lines += [
            f"  {v['value']!s:<24}{v['mean']:.4f}  best {v['best']:.4f}  of {v['num_runs']} runs"
            for v in effect["values"]
        ]
    return lines


# ---- curves


def sparkline(curve: list[tuple[int, float]], *, low: float, high: float, width: int = 16) -> str:
    """Returns a curve as at most `width` blocks, each the mean of its stretch of the curve.

    The lowest block stands for `low` or less, the highest for `high` or more.
    """
    values = [value for _, value in curve if math.isfinite(value)]
    if not values:
        return ""
    means = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    scale = (len(_BLOCKS) - 1) / max(high - low, 1e-12)
    return "".join(
        _BLOCKS[round(min(max((mean - low) * scale, 0), len(_BLOCKS) - 1))] for mean in means
    )


def plot_curves(results: list[Result], path: str, *, label) -> None:
    """Draws training (thin) and held-out (dots) bits per byte of all runs into a file.

    Args:
        path: of a .png, .svg or .pdf file.
        label: result -> its text in the legend.

    Raises:
        UserError: the file cannot be written, or matplotlib is not installed.
    """
    # The backend that needs no screen.
    require("matplotlib", extra="sweep").use("agg")
    pyplot = require("matplotlib.pyplot", extra="sweep")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, max(len(results), 1)))
    for result, colour in zip(ranked(results), colours):
        if result.train_curve:
            axes.plot(*zip(*result.train_curve), color=colour, linewidth=0.7, alpha=0.6)
        if result.curve:
            axes.plot(*zip(*result.curve), "o-", color=colour, markersize=3)
        # apart from the curve: it is taken on more of the text
        if result.state == "complete" and not math.isnan(result.bits_per_byte):
            axes.plot(
                result.step,
                result.bits_per_byte,
                "*",
                color=colour,
                markersize=7,
                label=label(result),
            )
    axes.set(
        xlabel="step", ylabel="bits per byte (dots: held-out; star: final bound)", xscale="log"
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
    try:
        figure.savefig(path)
    # ValueError: an ending that matplotlib does not know.
    except (OSError, ValueError) as error:
        raise UserError(
            f"The curves cannot be drawn into {path!r} ({error}); name a .png, .svg or .pdf file."
        ) from error
    finally:
        pyplot.close(figure)
