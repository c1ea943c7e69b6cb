"""The curves of a run and the texts that it sampled on one page, which any browser shows without
TensorBoard or a network; and the frontier of its sampler, where one was measured
(benchmarks/frontier.py).
"""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from llada_jax.schemas import Frontier, SampleQuality
from llada_jax.units import format_count

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 230, 52, 28
# Distinguishable for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# The lines of the first seven curves, of the next seven, and so on: as SVG and in the key.
DASHES = (("", "solid"), ("6 3", "dashed"), ("1 3", "dotted"))

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222; }
figure { display: inline-block; margin: 0 1em 1.5em 0; vertical-align: top; }
figcaption { font-weight: 600; }
svg { background: #fafafa; }
svg text { font-size: 11px; fill: #555; }
polyline { fill: none; stroke-width: 1.6; }
circle { fill-opacity: 0; } circle:hover { fill-opacity: 1; }
table { border-collapse: collapse; }
td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top; }
.samples td { white-space: pre-wrap; }
.key { display: inline-block; width: 1.4em; margin: 0 .3em .2em .8em; border-top: .25em; }
"""


class Curve(NamedTuple):
    name: str
    points: list[tuple[float, float]]  # (step or cost, value), finite


def curves_of(lines: Sequence[dict]) -> dict[str, list[Curve]]:
    """Returns {title: curves} of what a run has written to metrics.jsonl; titles without a number
    are left out.

    Args:
        lines: llada_jax.run.metrics_file.read_lines.
    """
    heldout = sorted({group for line in lines for group in line if group.startswith("heldout")})
    wanted = {
        "Training loss (nats per token)": [("train", "loss")],
        "Bound (bits per byte)": [(group, "bits_per_byte") for group in ("train", *heldout)],
        "Loss by diffusion time, t0 clean to t9 masked (nats per masked token)": [
            ("train", f"nll_t{part}") for part in (0, 1, 3, 5, 7, 9)
        ],
        "Length of the gradient": [("train", "grad_norm")],
        "Learning rate": [("train", "learning_rate")],
        "Throughput (tokens per second)": [("speed", "tokens_per_s")],
    }
    found = {}
    for title, keys in wanted.items():
        curves = []
        for group, key in keys:
            values = ((line["step"], line.get(group, {}).get(key)) for line in lines)
            points = [
                (step, float(value))
                for step, value in values
                if isinstance(value, int | float) and math.isfinite(value)
            ]
            if points:
                curves.append(Curve(group if key == "bits_per_byte" else key, points))
        if curves:
            found[title] = curves
    return found


def frontier_of(frontier: Frontier) -> dict[str, list[Curve]]:
    """Returns {title: curves} of a frontier: the quality against the cost, a curve per rule.

    Against passes, rules are compared that compute the same in each. A cache saves columns of a
    pass, so that it is better only against these.
    """
    measures = {
        "Bits per byte by the control": "bits_per_byte",
        "Repeated phrases": "repetition",
        "Distance of the token frequencies": "unigram_distance",
    }
    found: dict[str, list[Curve]] = {}
    for cost in ("passes_per_token", "columns_per_token"):
        for title, key in measures.items():
            families: dict[str, list[tuple[float, float]]] = {}
            for row in frontier.rows:
                point = (getattr(row, cost), getattr(row, key))
                families.setdefault(row.family, []).append(point)
            found[f"{title} against {cost.replace('_', ' ')}"] = [
                Curve(family, sorted(points)) for family, points in families.items()
            ]
    return found


def _measures(one: SampleQuality) -> list[str]:
    return [f"{value:.3f}" for value in (one.bits_per_byte, one.repetition, one.unigram_distance)]


def _frontier(frontier: Frontier) -> str:
    """Returns the part of the page about the sampler: figures, and all numbers in a table."""
    figures = "".join(
        _figure(title, curves, x_name=title.rpartition(" against ")[2])
        for title, curves in frontier_of(frontier).items()
    )
    heads = ["setting", "passes per token", "columns per token", "bits per byte", "repetition"]
    rows = [[*heads, "unigram distance", "no worse than the first"]]
    for name, one in frontier.baselines.items():
        rows.append([name, "", "", *_measures(one), ""])
    for row in frontier.rows:
        costs = [f"{cost:.3f}" for cost in (row.passes_per_token, row.columns_per_token)]
        rows.append([row.name, *costs, *_measures(row), "yes" if row.is_no_worse else "no"])
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<h2>Speed and quality of the sampler</h2>{figures}<table>{table}</table>"


def _figure(title: str, curves: Sequence[Curve], *, x_name: str = "step") -> str:
    """Returns one chart as SVG with a legend; each point says its place and value in a title."""
    xs = [step for curve in curves for step, _ in curve.points]
    ys = [value for curve in curves for _, value in curve.points]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    first, last = min(xs), max(xs)
    last = last if last > first else first + 1

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 10) * (step - first) / (last - first)
        return x, 10 + (HEIGHT - BOTTOM - 10) * (high - value) / (high - low)

    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        _, y = at(first, value)
        ends = f'x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        step = first + share * (last - first)
        x, _ = at(step, low)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        label = format_count(round(step)) if x_name == "step" else f"{step:.2g}"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>')
    keys = []
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        dash, style = DASHES[min(number // len(COLOURS), len(DASHES) - 1)]
        places = [at(*point) for point in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{line}" stroke="{colour}"{dashes}/>')
        name = html.escape(curve.name)
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
            f"<title>{name}, {x_name} {step:.5g}: {value:.5g}</title></circle>"
            for (x, y), (step, value) in zip(places, curve.points)
        ]
        border = f"border-top-style:{style};border-color:{colour}"
        keys.append(f'<span class="key" style="{border}"></span>{name}')
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'
        f"<div>{''.join(keys) if len(curves) > 1 else ''}</div></figure>"
    )


def _rows(result: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns the leaves of a nested result as rows of a table."""
    rows = []
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _rows(value, f"{name}.")
            continue
        if isinstance(value, list):
            value = "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
        elif isinstance(value, float):
            value = f"{value:.5g}"
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>")
    return rows


def _samples(samples: Sequence[dict]) -> str:
    """Returns the part of the page with the texts of a run, by step."""
    if not samples:
        return ""
    rows = "".join(
        f"<tr><td>{sample['step']}</td><td><b>{html.escape(sample['prompt'])}</b>"
        f"{html.escape(sample['text'])}</td></tr>"
        for sample in samples
    )
    return f'<h2>Samples</h2><table class="samples">{rows}</table>'


def report_page(
    title: str,
    lines: Sequence[dict],
    result: dict[str, Any],
    frontier: Frontier | None = None,
    samples: Sequence[dict] = (),
) -> str:
    """Returns the page: the curves of metrics.jsonl, and the result of an evaluation as a table.

    Args:
        title: the checkpoint, for example.
        lines: of metrics.jsonl; [] for a model that was not trained here.
        result: what `evaluate --json` prints.
        frontier: of the sampler; None where it was not measured.
        samples: of samples.jsonl, what the run has sampled while it trained.
    """
    figures = "".join(_figure(name, curves) for name, curves in curves_of(lines).items())
    missing = "" if figures else "<p>There is no metrics.jsonl next to this checkpoint.</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<h2>Evaluation</h2><table>{''.join(_rows(result))}</table>"
        f"<h2>Curves</h2>{missing}{figures}{_samples(samples)}"
        f"{'' if frontier is None else _frontier(frontier)}</body></html>\n"
    )
