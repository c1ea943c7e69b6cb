"""The command `llada-jax sweep`: its flags, its fit, the example in the docs, and real training."""

import itertools
import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
from support.paths import ROOT
from support.records import small_record
from support.runs import SMALL_RUN, metric_lines
from support.sweeps import RATES, error_of
from support.tensorboard import board_of

from llada_jax.models.transformer import Architecture
from llada_jax.sweeps.scaling_law import FinishedRun, fit_surface

SCALING = ROOT / "docs" / "scaling.md"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do; give exactly one of --list, --index"),
        (["--list", "--table"], "got --list and --table"),
        (["--index", "3"], "--index 3: "),
        (["--index", "-1"], "has the runs 0 to 2"),
        (["--run", "lcoal"], "--run lcoal is unknown"),
        (["--list", "--plot", "x.png"], "--plot goes with --table and not with --list"),
        (["--run", "local", "--json"], "--json goes with"),
        (["--index", "0", "--dry-run"], "--dry-run goes with --run"),
        (["--table", "--parallel", "2"], "--parallel goes with"),
        (["--run", "local", "--parallel", "0"], "--parallel 0 must be at least 1"),
        (["--run", "local", "--", "--partition", "x"], "The words after -- (--partition ...)"),
        (["--optuna", "3"], "--optuna needs suggest(trial)"),
        (["--config.schedule.learning_rate=1.0", "--list"], "set by the sweep as well"),
        (["--config.sede=1", "--list"], "Did you mean 'seed'?"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_one_sentence(
    flags, words, write_config, call_sweep, tmp_path
):
    write_config(RATES)
    _, err = call_sweep(*flags, status=2)
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_fit_of_a_sweep_reads_sizes_and_tokens_from_the_runs(
    write_config, call_sweep, tmp_path, fake_train
):
    """Three budgets on a known parabola, written as train would; the exponent comes out of the
    files.
    """
    write_config("for i in range(12): add(seed=i)")
    call_sweep("--index", "0")
    runs = []
    for index, (compute, factor) in enumerate(
        itertools.product((1e12, 1e13, 1e14), (0.5, 0.8, 1.5, 2.5))
    ):
        d_model = 2 * round(32 * (compute / 1e12) ** 0.25 * factor**0.5)
        # of two layers, heads of width 2 and d_ff = d_model
        size = 2 * (4 * d_model**2 + 3 * d_model**2)
        workdir = tmp_path / "runs" / f"{index:03d}"
        workdir.mkdir(exist_ok=True)
        fields = {
            "vocab_size": 320,
            "num_layers": 2,
            "d_model": d_model,
            "num_heads": d_model // 2,
            "num_kv_heads": d_model // 2,
            "head_dim": 2,
            "d_ff": d_model,
        }
        record = small_record(architecture=Architecture(**fields))
        (workdir / "run.json").write_text(json.dumps(record.to_json()))
        best = 57344 * (compute / 1e12) ** 0.5  # 14 * 64**2
        loss = 3 + 0.1 * math.log(size / best) ** 2
        tokens = compute / 6 / size
        # the head, and two products of 4,096 positions by the width per layer, three times over
        flops_per_token = 6 * (size + 320 * d_model) + 12 * 2 * d_model * 4096
        runs.append(FinishedRun(size, tokens, loss, flops_per_token))
        train = {"step": 10, "train": {"bits_per_byte": 4.0, "tokens": tokens}}
        final = {"step": 10, "final": {"nelbo": loss, "bits_per_byte": loss / math.log(2)}}
        (workdir / "metrics.jsonl").write_text(f"{json.dumps(train)}\n{json.dumps(final)}\n")
    fit = json.loads(call_sweep("--fit", "--json")[0])
    assert fit["isoflop"]["laws"]["parameters"]["exponent"]["value"] == pytest.approx(0.5, abs=1e-3)
    assert [budget["parameters"] for budget in fit["isoflop"]["budgets"]] == pytest.approx(
        [57344, 57344 * 10**0.5, 573440], rel=1e-2
    )
    expected = fit_surface(runs).value
    assert fit["isoflop"]["flops_exponent"]["value"] == pytest.approx(expected, rel=1e-6)
    without_head_and_attention = [run._replace(flops_per_token=None) for run in runs]
    assert fit_surface(without_head_and_attention).value != pytest.approx(expected, rel=0.01)
    out, _ = call_sweep("--fit")
    assert "N_opt = " in out
    assert "C^0.500" in out
    assert (
        "these runs do not determine this law" in out
    )  # the parabolas are not a sum of two powers


def test_a_fit_without_enough_runs_is_refused_in_one_sentence(write_config, call_sweep):
    write_config(RATES)
    assert "0 finished runs hold no compute budget" in call_sweep("--fit", status=2)[1]


def test_the_sweep_in_the_docs_has_the_runs_that_the_docs_say(call_sweep, tmp_path):
    (example, _) = re.findall(
        r"^```python\n(.*?)^```", SCALING.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    (tmp_path / "config.py").write_text(example)
    lines = [line.split("missing")[1].split() for line in call_sweep("--list")[0].splitlines()]
    rates = ["schedule.learning_rate=0.0003", "schedule.learning_rate=0.001"]
    sizes = [
        ["model.num_layers=4", "model.d_model=256"],
        ["model.num_layers=8", "model.d_model=512"],
    ]
    assert lines == [["seed=1"], ["optimizer.b2=0.98", "seed=1"]] + [
        [*size, rate] for size in sizes for rate in rates
    ]


@pytest.mark.slow
def test_a_real_sweep_is_stopped_continues_and_has_the_table_of_its_metrics(
    start_sweep, call_sweep, write_config, tmp_path
):
    """SIGTERM in the second run: exit 42; the same command then trains only what was missing, and
    the numbers are train's.
    """
    base = SMALL_RUN.replace("num_steps = 20", "num_steps = 100").replace(
        "every_steps = 10", "every_steps = 50"
    )
    base = base.replace("log.tensorboard = False", "log.tensorboard = True")
    write_config("for rate in (1e-2, 1e-4): add({'schedule.learning_rate': rate})", base=base)
    process = start_sweep("--run", "local")
    second = tmp_path / "runs" / "001" / "metrics.jsonl"
    while process.poll() is None and not (
        second.exists() and len(second.read_text().splitlines()) > 3
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "1 of 2 runs left" in error_of(process, status=42)
    listed = json.loads(call_sweep("--list", "--json", *start_sweep.words)[0])["runs"]
    assert [run["state"] for run in listed] == ["complete", "partial"]
    assert 3 <= (stopped := listed[1]["step"]) < 100
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "000").rglob("*")}

    assert "1 of 2 runs are to be done" in error_of(start_sweep("--run", "local"), status=0)
    assert untouched == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "000").rglob("*")
    }
    log = (tmp_path / "runs" / "001" / "train.log").read_text()
    assert f"step {stopped} of 100 is saved" in log
    assert f"step {stopped + 1}/100" in log

    table = json.loads(call_sweep("--table", "--json", *start_sweep.words)[0])
    assert [run["index"] for run in table["runs"]] == [0, 1]  # 1e-4 has learnt less in 100 steps
    for run in table["runs"]:
        lines = metric_lines(run["workdir"])
        assert [line["step"] for line in lines if "train" in line] == list(range(1, 101))
        assert run["bits_per_byte"] == lines[-1]["final"]["bits_per_byte"]
        assert run["tokens"] == 100 * 16 * 32
        trained = json.loads((Path(run["workdir"]) / "run.json").read_text())["config"]
        assert trained["schedule"]["learning_rate"] == run["knobs"]["schedule.learning_rate"]
        board = board_of(Path(run["workdir"]))
        assert board.PluginTagToContent("hparams")
        (shown,) = board.Scalars("hparam/bits_per_byte")
        assert shown.value == pytest.approx(run["bits_per_byte"], rel=1e-6)
    (effect,) = table["effects"]
    assert effect["spread"] == pytest.approx(
        table["runs"][1]["bits_per_byte"] - table["runs"][0]["bits_per_byte"]
    )
