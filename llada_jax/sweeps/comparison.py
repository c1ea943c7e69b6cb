"""Comparing the runs of a sweep: their ranking, and which knob moved the held-out bits per byte."""

import math
from collections import Counter

import numpy as np

from llada_jax.sweeps.results import Result
from llada_jax.sweeps.runs import hashable


def ranked(results: list[Result]) -> list[Result]:
    """Returns the complete runs by held-out bits per byte, best first, and then the others.

    The numbers of the others come from fewer steps and cannot be compared with those of whole runs.
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
    """Returns what each knob that varies did to the held-out bits per byte, the strongest first.

    Only complete runs are compared.

    Args:
        settings: for each result the value of every knob that some run sets; where the run does not
            set it, the value of the config.

    Each dict: knob; values, [{value, mean, best, num_runs}]; spread, the largest mean minus the
    smallest; rank_correlation (Spearman's; None unless the values are numbers); moves_with, the
    knobs that change exactly when this one does, so that their effects cannot be told apart;
    is_balanced, whether every value was combined with the same settings of all other knobs (if not,
    the means also differ because of the others).
    """
    pairs = [
        (result.bits_per_byte, {name: hashable(value) for name, value in knobs.items()})
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
        partition = _partition(column)
        together = [o for o in columns if o != name and _partition(columns[o]) == partition]
        others = [columns[o] for o in columns if o != name and o not in together]
        # {value: how often it was combined with each setting of the other knobs}
        combined = {
            value: Counter(zip(*(_where(other, column, value) for other in others)))
            for value in set(column)
        }
        values = [
            _summary(value, np.array(_where(bits, column, value)))
            for value in sorted(set(column), key=_sort_key)
        ]
        means = [value["mean"] for value in values]
        is_numeric = all(map(_is_number, column))
        found.append(
            {
                "knob": name,
                "values": values,
                "spread": max(means) - min(means),
                "rank_correlation": rank_correlation(column, bits) if is_numeric else None,
                "moves_with": together,
                "is_balanced": all(c == next(iter(combined.values())) for c in combined.values()),
            }
        )
    return sorted(found, key=lambda effect: -effect["spread"])


def _summary(value, bits: np.ndarray) -> dict:
    mean, best = float(bits.mean()), float(bits.min())
    return {"value": value, "mean": mean, "best": best, "num_runs": len(bits)}


def unlike(scored_on: list[dict[str, object]], names: list[str]) -> list[str]:
    """Returns a line for each respect in which the held-out bounds of runs cannot be compared.

    Args:
        scored_on: for each run what its bound is taken with (Run.scored_on). names: of the runs.
    """
    lines = []
    for respect in scored_on[0] if scored_on else {}:
        runs_of: dict[str, list[str]] = {}
        for scored, name in zip(scored_on, names):
            runs_of.setdefault(str(scored[respect]), []).append(name)
        if len(runs_of) > 1:
            differ = "; ".join(f"{value} in {', '.join(runs)}" for value, runs in runs_of.items())
            lines.append(f"held-out bounds are not alike: {respect} {differ}")
    return lines


def rank_correlation(x, y) -> float | None:
    """Returns Spearman's rank correlation, ties at their mean rank; None where x or y is constant.

    Written out here, because scipy takes a second to import and `--table` should not.
    """
    ranks = [_ranks(np.asarray(values, float)) for values in (x, y)]
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])  # type: ignore[call-overload]


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _where(column, by, value) -> list:
    return [entry for entry, key in zip(column, by) if key == value]


def _partition(column: list) -> list[int]:
    """Returns the column with each value replaced by where it first occurs.

    That makes two columns equal if and only if they change together.
    """
    return [column.index(value) for value in column]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sort_key(value):
    return (0, value, "") if _is_number(value) else (1, 0, str(value))
