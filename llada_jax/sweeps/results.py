"""What the runs of a sweep left in their workdirs: state, curve, ranking, and which knob moved the
held-out bits per byte.
"""

import json
import math
import os
from collections import Counter
from typing import NamedTuple

import numpy as np
from etils import epath

from llada_jax.errors import UserError, require
from llada_jax.run.metrics_file import is_over, read_lines

EXIT_FILE = "exit.json"  # how the last attempt ended; written by `sweep`, which starts the attempts
FINISHED = ("complete", "diverged", "pruned")  # starting these again would give the same
INTERRUPTED = (
    42,
    130,
    143,
)  # exit statuses: saved and stopped; Ctrl-C or SIGTERM before there was anything to save
BLOCKS = "▁▂▃▄▅▆▇█"
MOST_VALUES = 10  # of a knob that the table lists one by one


class Result(NamedTuple):
    """One run of a sweep.

    knobs: what the run sets. state: missing, partial, complete, failed (mend it and start again),
    diverged (its loss is not finite) or pruned (by Optuna). step: of the last line of
    metrics.jsonl; 0 without one. tokens: trained on until then. bits_per_byte, standard_error,
    nats_per_token: the newest held-out bound, nan without one; the mean over the held-out splits of
    a mixture. curve: (step, held-out bits per byte); train_curve: the same on training batches.
    """

    index: int
    knobs: dict
    workdir: str
    state: str
    step: int
    num_steps: int
    tokens: float
    bits_per_byte: float
    standard_error: float
    nats_per_token: float
    curve: list[tuple[int, float]]
    train_curve: list[tuple[int, float]]


def read_result(workdir, *, index: int, knobs: dict, num_steps: int) -> Result:
    """Returns what a workdir holds, of a run that may be missing, under way or over."""
    entries = read_lines(workdir)
    train = [(entry["step"], entry["train"]) for entry in entries if "train" in entry]
    bounds = [(entry["step"], bound) for entry in entries if (bound := _heldout(entry))]
    last = (
        bounds[-1][1]
        if bounds
        else dict.fromkeys(("bits_per_byte", "standard_error", "nats_per_token"), math.nan)
    )
    step = entries[-1]["step"] if entries else 0
    state = _state(workdir, is_over=is_over(entries, num_steps), has_begun=bool(entries))
    return Result(
        index,
        knobs,
        str(workdir),
        state,
        step,
        num_steps,
        train[-1][1]["tokens"] if train else 0,
        **last,
        curve=[(step, bound["bits_per_byte"]) for step, bound in bounds],
        train_curve=[(step, float(numbers["bits_per_byte"])) for step, numbers in train],
    )


def write_exit(workdir, *, status: int, pruned: bool = False) -> None:
    """Records how an attempt at a run ended: the exit status of `train`."""
    path = epath.Path(workdir) / EXIT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = (
        path.parent / f"{EXIT_FILE}.{os.getpid()}.partial"
    )  # the processes of a run on several hosts all write it
    partial.write_text(json.dumps({"exit_status": status, "pruned": pruned}) + "\n")
    partial.replace(path)


def _state(workdir, *, is_over: bool, has_begun: bool) -> str:
    path = epath.Path(workdir) / EXIT_FILE
    ended = json.loads(path.read_text()) if path.exists() else {"exit_status": 42, "pruned": False}
    if is_over or ended["exit_status"] == 0:
        return "complete"
    if ended["pruned"]:
        return "pruned"
    if ended["exit_status"] == 3:
        return "diverged"
    if ended["exit_status"] not in INTERRUPTED:
        return "failed"
    return "partial" if has_begun else "missing"


def _heldout(entry: dict) -> dict[str, float]:
    """Returns the held-out bound of a line, {} without one; the mean over splits where a mixture
    has several.
    """
    groups = [group for key, group in entry.items() if key.startswith(("heldout", "final"))]
    if not groups:
        return {}
    nats = [float(group["nelbo"] if "nelbo" in group else group["nll"]) for group in groups]
    bits = [float(group["bits_per_byte"]) for group in groups]
    errors = [
        float(group.get("standard_error", math.nan)) * b / n
        for group, b, n in zip(groups, bits, nats)
    ]
    return {
        "bits_per_byte": float(np.mean(bits)),
        "standard_error": math.sqrt(sum(error**2 for error in errors))
        / len(errors),  # of bits per byte
        "nats_per_token": float(np.mean(nats)),
    }


# ---- comparisons


def ranked(results: list[Result]) -> list[Result]:
    """Returns complete runs by held-out bits per byte, best first, then the others: their numbers
    are of fewer steps.
    """
    return sorted(
        results,
        key=lambda r: (
            r.state != "complete",
            math.inf if math.isnan(r.bits_per_byte) else r.bits_per_byte,
            r.index,
        ),
    )


def effects(results: list[Result], settings: list[dict]) -> list[dict]:
    """Returns what each knob that varies did to the held-out bits per byte of the complete runs,
    the strongest first.

    Args:
        settings: for each result the value of every knob that some run sets, the config's own where
            the run sets none.

    Each dict: knob; values, [{value, mean, best, num_runs}]; spread, the largest mean minus the
    smallest; rank_correlation (Spearman's; None unless the values are numbers); moves_with, knobs
    that change exactly when this one does and cannot be told from it; is_balanced, whether every
    value met the same settings of all other knobs: otherwise the means differ for the others' sake
    too.
    """
    pairs = [
        (result.bits_per_byte, {name: _hashable(value) for name, value in knobs.items()})
        for result, knobs in zip(results, settings)
        if result.state == "complete" and math.isfinite(result.bits_per_byte)
    ]
    bits = np.array([b for b, _ in pairs])
    columns = {
        name: [knobs[name] for _, knobs in pairs] for name in (settings[0] if settings else {})
    }
    columns = {name: column for name, column in columns.items() if len(set(column)) > 1}
    found = []
    for name, column in columns.items():
        together = [
            o
            for o, other in columns.items()
            if o != name and _partition(other) == _partition(column)
        ]
        others = [other for o, other in columns.items() if o != name and o not in together]
        met = {
            value: Counter(zip(*(_where(other, column, value) for other in others)))
            for value in set(column)
        }
        values = []
        for value in sorted(set(column), key=_sort_key):
            chosen = np.array(_where(bits, column, value))
            values.append(
                {
                    "value": value,
                    "mean": float(chosen.mean()),
                    "best": float(chosen.min()),
                    "num_runs": len(chosen),
                }
            )
        means = [value["mean"] for value in values]
        found.append(
            {
                "knob": name,
                "values": values,
                "spread": max(means) - min(means),
                "rank_correlation": rank_correlation(column, bits)
                if all(map(_is_number, column))
                else None,
                "moves_with": together,
                "is_balanced": all(counts == next(iter(met.values())) for counts in met.values()),
            }
        )
    return sorted(found, key=lambda effect: -effect["spread"])


def rank_correlation(x, y) -> float | None:
    """Returns Spearman's rank correlation, ties at their mean rank; None where x or y is constant."""
    ranks = [_ranks(np.asarray(values, float)) for values in (x, y)]
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _where(column, by, value) -> list:
    return [entry for entry, key in zip(column, by) if key == value]


def _partition(column: list) -> list[int]:
    """Returns the column with each value replaced by where it stands first: equal for columns that
    change together.
    """
    return [column.index(value) for value in column]


def _hashable(value):
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sort_key(value):
    return (0, value, "") if _is_number(value) else (1, 0, str(value))


# ---- as text


def progress_of(result: Result) -> str:
    """Returns e.g. "complete", "missing", "120/400", "failed 120/400"."""
    if result.state in ("complete", "missing"):
        return result.state
    steps = f"{result.step}/{result.num_steps}"
    return steps if result.state == "partial" else f"{result.state} {steps}"


def table_lines(results: list[Result], found: list[dict], *, label) -> list[str]:
    """Returns the ranking as text, with the training curves as blocks on one scale, and the effects
    of the knobs.

    Args:
        found: from `effects`. label: result -> what it changes.
    """
    values = [bits for result in results for _, bits in result.train_curve if math.isfinite(bits)]
    low, high = np.quantile(
        values or [0.0, 1.0], [0, 0.95]
    )  # the first steps would squeeze all that follows
    lines = [f"{'rank':>4}  {'run':<5}{'bits/byte':<19}{'training':<18}{'state':<18}changes"]
    for rank, result in enumerate(ranked(results), start=1):
        is_known = not math.isnan(result.bits_per_byte)
        bits = f"{result.bits_per_byte:.4f}" if is_known else "-"
        bits += "" if math.isnan(result.standard_error) else f" +- {result.standard_error:.4f}"
        place = rank if is_known and result.state == "complete" else "-"
        curve = sparkline(result.train_curve, low=low, high=high)
        lines.append(
            f"{place:>4}  {result.index:03d}  {bits:<19}{curve:<18}{progress_of(result):<18}{label(result)}".rstrip()
        )
    if found:
        lines += [
            "",
            "mean held-out bits/byte of the complete runs by value, the strongest knob first",
        ]
    shown = set()
    for effect in found:
        if effect["knob"] in shown:
            continue
        shown |= {effect["knob"], *effect["moves_with"]}
        correlation = effect["rank_correlation"]
        notes = [f"moves {effect['spread']:.4f}"]
        notes += [] if correlation is None else [f"rank correlation {correlation:+.2f}"]
        notes += (
            [f"cannot be told from {', '.join(effect['moves_with'])}"]
            if effect["moves_with"]
            else []
        )
        notes += [] if effect["is_balanced"] else ["other knobs differ between its values, too"]
        lines.append(f"{effect['knob']}: {'; '.join(notes)}")
        for v in effect["values"] if len(effect["values"]) <= MOST_VALUES else []:
            lines.append(
                f"  {v['value']!s:<24}{v['mean']:.4f}  best {v['best']:.4f}  of {v['num_runs']} "
                "runs"
            )
    return lines


# ---- drawing


def sparkline(curve: list[tuple[int, float]], *, low: float, high: float, width: int = 16) -> str:
    """Returns a curve as `width` blocks or fewer, the mean of each stretch, between the lines `low`
    and `high`.
    """
    values = [value for _, value in curve if math.isfinite(value)]
    if not values:
        return ""
    means = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    scale = (len(BLOCKS) - 1) / max(high - low, 1e-12)
    return "".join(
        BLOCKS[round(min(max((mean - low) * scale, 0), len(BLOCKS) - 1))] for mean in means
    )


def plot_curves(results: list[Result], path: str, *, label) -> None:
    """Draws training (thin) and held-out (dots) bits per byte of all runs into a .png, .svg or .pdf
    file.

    Args:
        label: result -> its text in the legend.
    """
    require("matplotlib", extra="sweep").use("agg")  # no screen is needed
    pyplot = require("matplotlib.pyplot", extra="sweep")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, max(len(results), 1)))
    for result, colour in zip(ranked(results), colours):
        if result.train_curve:
            axes.plot(*zip(*result.train_curve), color=colour, linewidth=0.7, alpha=0.6)
        if result.curve:
            axes.plot(*zip(*result.curve), "o-", color=colour, markersize=3, label=label(result))
    axes.set(xlabel="step", ylabel="bits per byte (dots: held-out)", xscale="log")
    if any(result.curve for result in results):
        axes.legend(fontsize="x-small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(
            f"The curves cannot be drawn into {path!r} ({error}); name a .png, .svg or .pdf file."
        ) from error
    finally:
        pyplot.close(figure)
