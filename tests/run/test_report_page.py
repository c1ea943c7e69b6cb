"""The page of a run: its curves and results, in one well-formed file that loads nothing."""

import re
import xml.etree.ElementTree as ET

from llada_jax.run.report_page import curves_of, frontier_of, report_page
from llada_jax.schemas import Frontier

LINES = [
    {"step": 10, "train": {"loss": 3.0, "bits_per_byte": 2.0, "nll_t0": 1.0, "nll_t9": 4.0}},
    {"step": 20, "train": {"loss": float("nan"), "nll_t9": 3.5}, "speed": {"tokens_per_s": 100.0}},
    {"step": 30, "heldout": {"bits_per_byte": 1.5, "nelbo": 2.5}},
]

MEASURES = {"bits_per_byte": 2.5, "repetition": 0.0, "unigram_distance": 0.25}


def test_curves_hold_the_finite_numbers_of_each_group():
    found = curves_of(LINES)
    assert found["Training loss (nats per token)"] == [("loss", [(10, 3.0)])]
    assert found["Bound (bits per byte)"] == [
        ("train", [(10, 2.0)]),
        ("heldout", [(30, 1.5)]),
    ]
    (by_time,) = (curves for title, curves in found.items() if "diffusion time" in title)
    assert by_time == [("nll_t0", [(10, 1.0)]), ("nll_t9", [(10, 4.0), (20, 3.5)])]
    assert "Learning rate" not in found


def test_the_page_is_one_well_formed_file_that_loads_nothing():
    page = report_page("runs/<a>", LINES, {"step": 30, "forwards": {"exact_match": 0.5}})
    document = ET.fromstring(
        page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "")
    )
    assert document.findtext(".//h1") == "runs/<a>"
    cells = [cell.text for cell in document.iter("td")]
    assert cells == ["step", "30", "forwards.exact_match", "0.5"]
    assert len(list(document.iter("svg"))) == 4
    assert not re.search(r"src=|href=|@import|url\(", page)


def test_points_lie_where_their_values_are():
    """Of a line from 4 at the first step to 3.5 at the last, the ends are the corners."""
    page = report_page("a", [{"step": s, "train": {"loss": v}} for s, v in ((0, 4), (10, 3))], {})
    (points,) = re.findall(r'polyline points="([^"]+)"', page)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert (x0, y0) == (52.0, 10.0)
    assert (x1, y1) == (450.0, 202.0)
    assert "<title>loss, step 10: 3</title>" in page


def test_a_model_that_was_not_trained_here_has_no_curves():
    assert "no metrics.jsonl" in report_page("a", [], {})


def test_the_samples_of_a_run_are_listed_by_step_as_they_are():
    samples = [
        {"step": 10, "prompt": "", "text": "<b>&\n  x"},
        {"step": 20, "prompt": "Once", "text": " upon"},
    ]
    page = report_page("a", [], {}, samples=samples)
    document = ET.fromstring(
        page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "")
    )
    rows = ["".join(row.itertext()) for row in document.iter("tr")]
    assert rows == ["10<b>&\n  x", "20Once upon"]
    assert "Samples" not in report_page("a", [], {})


def frontier_with(costs: list[tuple[str, float]]) -> Frontier:
    """Returns a frontier of rules at so many passes per token, each pass over 64 columns, whose
    text is the better the more passes it took.
    """
    rows = [
        {
            "family": family,
            "name": f"{family} at {passes}",
            "passes_per_token": passes,
            "columns_per_token": 64 * passes,
            "is_no_worse": passes > 0.25,
            **MEASURES,
            "bits_per_byte": 3 - passes,
        }
        for family, passes in costs
    ]
    return Frontier.model_validate({"baselines": {"real text": MEASURES}, "rows": rows})


def test_a_frontier_is_drawn_by_rule_and_listed_with_its_baselines():
    frontier = frontier_with([("schedule", 1.0), ("schedule", 0.25), ("factor", 0.5)])
    curves = frontier_of(frontier)
    by_passes = curves["Bits per byte by the control against passes per token"]
    assert by_passes == [("schedule", [(0.25, 2.75), (1.0, 2.0)]), ("factor", [(0.5, 2.5)])]
    by_columns = curves["Bits per byte by the control against columns per token"]
    assert by_columns == [("schedule", [(16, 2.75), (64, 2.0)]), ("factor", [(32, 2.5)])]
    page = report_page("a", [], {}, frontier)
    ET.fromstring(page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', ""))
    assert "<title>schedule, passes per token 0.25: 2.75</title>" in page
    assert "<title>schedule, columns per token 16: 2.75</title>" in page
    listed = [re.findall("<td>([^<]*)</td>", row) for row in page.split("<tr>")[1:]]
    assert listed[1] == ["real text", "", "", "2.500", "0.000", "0.250", ""]
    assert listed[3] == ["schedule at 0.25", "0.250", "16.000", "2.750", "0.000", "0.250", "no"]


def test_every_rule_is_drawn_in_a_line_of_its_own_however_many_there_are():
    families = [f"rule {number}" for number in range(10)]
    page = report_page("a", [], {}, frontier_with([(family, 0.5) for family in families]))
    for figure in page.split("<figure>")[1:]:
        lines = re.findall(r'<polyline points="[^"]+" ([^>]*)/>', figure)
        assert len(set(lines)) == 10
        for family in families:
            assert figure.count(f"<title>{family}, ") == 1
            assert figure.count(f"</span>{family}<") == 1
