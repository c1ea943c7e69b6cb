"""The table of a sweep and its curves."""

import json
import math

import pytest
from support.required import library
from support.runs import metric_lines
from support.sweeps import BASE, RATES

from llada_jax.sweeps.results import read_result
from llada_jax.sweeps.table import sparkline, table_lines


@pytest.mark.slow
def test_table_has_the_numbers_of_metrics_jsonl_best_first(
    write_config, call_sweep, tmp_path, fake_train
):
    write_config(
        "for rate in (1e-2, 1e-3, 3e-3): add({'schedule.learning_rate': rate})", "add(seed=14)"
    )
    call_sweep("--run", "local")
    table = json.loads(call_sweep("--table", "--json")[0])
    assert [run["index"] for run in table["runs"]] == [
        1,
        2,
        0,
        3,
    ]  # what diverged comes last, whatever it had reached
    for run in table["runs"][:3]:
        lines = metric_lines(run["workdir"])
        assert run["bits_per_byte"] == lines[-1]["final"]["bits_per_byte"]
        assert run["nats_per_token"] == lines[-1]["final"]["nelbo"]
        assert run["standard_error"] == pytest.approx(0.01)  # 0.007 nats, at 0.7 nats a bit
        # without the final bound, which is taken on more of the text
        assert run["curve"] == [[5, lines[5]["heldout"]["bits_per_byte"]]]
        assert [step for step, _ in run["train_curve"]] == list(range(1, 11))
        assert run["tokens"] == 640
    out, _ = call_sweep("--table")
    first, second, third, fourth = out.splitlines()[1:5]
    assert first.split()[:5] == ["1", "001", "2.1000", "+-", "0.0100"]
    assert [line.split()[0] for line in (second, third, fourth)] == ["2", "3", "-"]
    assert "diverged 5/10" in fourth
    curve = first.split()[5]
    assert len(curve) == 10
    assert list(curve) == sorted(
        curve, reverse=True
    )  # the loss falls, and further than in the worst run
    assert (curve[0], curve[-1], third.split()[5][-1]) == ("█", "▁", "▃")
    assert "schedule.learning_rate: moves 0.9000; rank correlation +1.00" in out
    assert "  0.001                   2.1000  best 2.1000  of 1 runs" in out


def test_a_run_without_bits_per_byte_in_training_is_in_the_table(tmp_path):
    """As on rows that are filled up with end-of-text tokens."""
    final = {"nelbo": 1.4, "standard_error": 0.007, "bits_per_byte": 2.0}
    lines = [{"step": 2, "train": {"nelbo": 1.5, "tokens": 9}}, {"step": 2, "final": final}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    result = read_result(tmp_path, index=0, knobs={}, num_steps=2)
    assert (result.state, result.bits_per_byte, result.train_curve) == ("complete", 2.0, [])
    assert "2.0000 +- 0.0100" in table_lines([result], [], label=lambda run: "")[1]


@pytest.mark.slow
def test_table_says_which_bounds_are_not_alike(write_config, call_sweep, fake_train, runs):
    base = BASE.replace("nowhere", str(runs.dataset))
    write_config("add(seed=1)", "add(seed=2)", "add({'data.batch_size': 4})", base=base)
    call_sweep("--run", "local")
    # 125 rows are held out, and all of them are scored, in batches of whatever size
    assert json.loads(call_sweep("--table", "--json")[0])["notes"] == []
    few = ("--config.evaluation.final_num_batches=2", "--workdir", str(runs.directory / "few"))
    call_sweep("--run", "local", *few)
    (note,) = json.loads(call_sweep("--table", "--json", *few)[0])["notes"]
    assert note == "held-out bounds are not alike: rows [125] in 000, 001; [8] in 002"
    assert note in call_sweep("--table", *few)[0]


def test_a_moving_average_is_not_compared_with_raw_weights_without_a_word(
    write_config, call_sweep, fake_train
):
    write_config("for decay in (0.0, 0.99): add({'optimizer.ema_decay': decay})")
    call_sweep("--run", "local")
    (note,) = json.loads(call_sweep("--table", "--json")[0])["notes"]
    assert note == "held-out bounds are not alike: weights raw in 000; ema in 001"


def test_table_before_anything_ran_is_a_table(write_config, call_sweep):
    write_config(RATES)
    lines = call_sweep("--table")[0].splitlines()
    assert len(lines) == 4
    assert all("missing" in line for line in lines[1:])
    assert json.loads(call_sweep("--table", "--json")[0])["runs"][0]["bits_per_byte"] is None


def test_sparkline_falls_with_the_curve_and_fits():
    curve = [(step, 8 - step / 25) for step in range(200)]
    line = sparkline(curve, low=0, high=8)
    assert len(line) == 16
    assert list(line) == sorted(line, reverse=True)
    assert (line[0], line[-1]) == ("█", "▁")
    assert sparkline([], low=0, high=1) == ""
    assert sparkline([(1, math.nan), (2, 1.0)], low=1, high=1) == "▁"


@pytest.mark.slow
def test_curves_are_drawn_into_a_file(write_config, call_sweep, tmp_path, fake_train):
    library("matplotlib")
    write_config(RATES)
    call_sweep("--run", "local")
    call_sweep("--table", "--plot", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    call_sweep("--table", "--plot", str(tmp_path / "curves.svg"))
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("<path") > 6
    assert (
        "name a .png, .svg or .pdf file"
        in call_sweep("--table", "--plot", str(tmp_path / "curves.xyz"), status=2)[1]
    )
