"""`llada-jax sweep`: which runs there are, how they are started, stopped and finished, and what the
table makes of them.

Most tests put a small program in the place of `llada-jax train` that writes the same files; the
slow ones train.
"""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT
from support.records import small_record
from support.required import library
from support.runs import SMALL_RUN, metric_lines

from llada_jax.__main__ import main
from llada_jax.config import apply_override, default_config, knob
from llada_jax.errors import UserError
from llada_jax.models.transformer import Architecture
from llada_jax.sweeps import grid
from llada_jax.sweeps.attempts import Attempts
from llada_jax.sweeps.results import effects, rank_correlation, ranked, read_result, sparkline
from llada_jax.sweeps.runs import words_of

SCALING = ROOT / "docs" / "scaling.md"

BASE = """
from llada_jax.config import default_config
from llada_jax import sweeps

def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.path = "nowhere"
    return config
"""

# Stands for `llada-jax train`: argv is WORKDIR WORD... It continues where metrics.jsonl stands, a
# step in 10 ms, and its loss depends on the learning rate. Seed 13 is a bug, 14 diverges; SIGTERM
# saves, as train does.
FAKE_TRAIN = """
import json, pathlib, signal, sys, time
workdir, words = pathlib.Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
workdir.mkdir(parents=True, exist_ok=True)
rate, steps = float(words.get("schedule.learning_rate", 4e-4)), int(words.get("num_steps", 10))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
print("fake training", *sys.argv[2:], flush=True)
if words.get("seed") == "13":
    sys.exit(1)
path = workdir / "metrics.jsonl"
done = len([1 for line in path.read_text().splitlines() if "train" in line]) if path.exists() else 0
with open(path, "a") as file:
    write = lambda entry: (file.write(json.dumps(entry) + "\\n"), file.flush())
    for step in range(done + 1, steps + 1):
        bits = 2 + 100 * rate + 4 / step
        write({"step": step, "train": {"bits_per_byte": bits, "tokens": 64 * step}, "speed": {}})
        if step % 5 == 0 and step < steps:
            write({"step": step, "heldout": {"nelbo": 0.7 * bits, "standard_error": 0.007, "bits_per_byte": bits}})
        if words.get("seed") == "14" and step == 5:
            sys.exit(3)
        time.sleep(0.01)
    bits = 2 + 100 * rate
    write({"step": steps, "final": {"nelbo": 0.7 * bits, "standard_error": 0.007, "bits_per_byte": bits}})
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """Puts FAKE_TRAIN in the place of `llada-jax train`."""
    program = tmp_path / "fake_train.py"
    program.write_text(FAKE_TRAIN)

    def command(sweep, run):
        return [sys.executable, str(program), run.workdir, *sweep.words, *words_of(run.changes)]

    monkeypatch.setattr("llada_jax.sweeps.attempts.train_command", command)


@pytest.fixture
def config(tmp_path):
    """Returns config(body of sweep or suggest) -> path of a config file with it."""

    def write(*lines: str, head: str = "def sweep(add):", base: str = BASE) -> str:
        path = tmp_path / "config.py"
        path.write_text(base + "\n" + head + "\n" + "".join(f"    {line}\n" for line in lines))
        return str(path)

    return write


@pytest.fixture
def call(tmp_path, capfd):
    """Returns call(*flags, status=0) -> (stdout, stderr) of `llada-jax sweep` on the config file
    and DIR of this test.
    """

    def call(*flags: str, status: int = 0) -> tuple[str, str]:
        words = [
            "sweep",
            "--config",
            str(tmp_path / "config.py"),
            "--workdir",
            str(tmp_path / "runs"),
            *flags,
        ]
        try:
            ended = main(words)
        except SystemExit as exit_:
            ended = exit_.code
        out, err = capfd.readouterr()
        assert ended == status, err
        return out, err

    return call


@contextlib.contextmanager
def stopped_under_way(run: Path):
    """Sends this process SIGTERM when the run has logged 20 lines."""

    def stop():
        path = run / "metrics.jsonl"
        while not path.exists() or len(path.read_text().splitlines()) < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    yield
    thread.join()


def states(call) -> list[str]:
    return [run["state"] for run in json.loads(call("--list", "--json")[0])["runs"]]


RATES = 'for rate in (1e-3, 3e-3, 1e-2): add({"schedule.learning_rate": rate})'


# ---- lists of knobs

values = st.lists(st.integers(0, 9), min_size=1, max_size=3)


@given(a=values, b=values, c=values)
def test_product_is_every_combination_the_last_fastest(a, b, c):
    expected = [dict(zip("abc", combination)) for combination in itertools.product(a, b, c)]
    assert grid.product({"a": a, "b": b, "c": c}) == expected
    assert grid.product({"a": a}, {"b": b}, {"c": c}) == expected
    assert grid.product({"a": a}, grid.product({"b": b}, {"c": c})) == expected


@given(pairs=st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=4))
def test_zip_pairs_values_and_chain_puts_lists_in_a_row(pairs):
    a, b = [list(column) for column in zip(*pairs)]
    expected = [{"a": x, "b": y} for x, y in pairs]
    assert grid.zip({"a": a, "b": b}) == expected
    assert grid.zip({"a": a}, [{"b": y} for y in b]) == expected
    assert grid.chain({"a": a}, expected) == [{"a": x} for x in a] + expected


def test_helpers_nest():
    sizes = grid.zip({"model.num_layers": [2, 4], "model.d_model": [64, 128]})
    runs = grid.chain(grid.product(sizes, {"seed": [0, 1]}), [{"seed": 7}])
    assert [run["seed"] for run in runs] == [0, 1, 0, 1, 7]
    assert [run.get("model.d_model") for run in runs] == [64, 64, 128, 128, None]


def test_add_takes_a_dict_keywords_or_both_and_numpys_numbers_become_pythons():
    def sweep(add):
        add()
        add(seed=1)
        add({"optimizer.b2": np.float32(0.5)}, seed=np.int64(2))

    runs = grid.added_by(sweep)
    assert runs == [{}, {"seed": 1}, {"optimizer.b2": 0.5, "seed": 2}]
    assert type(runs[2]["seed"]) is int
    assert type(runs[2]["optimizer.b2"]) is float


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid.zip({"a": [1, 2], "b": [1]}), r"sweeps.zip got lists of \[2, 1\] values"),
        (lambda: grid.product({"a": 3}), r"'a' the values 3; write a list, as in \[3\]"),
        (lambda: grid.product({"a": "adamw"}), r"'a' the values 'adamw'"),
        (lambda: grid.product({"a": [1]}, {"a": [2]}), r"sets 'a' twice in one run \(1 and 2\)"),
        (lambda: grid.added_by(lambda add: add({"seed": 1}, seed=2)), "sets 'seed' twice"),
        (lambda: grid.added_by(lambda add: add([{"seed": 1}])), "must be given a dict"),
    ],
)
def test_a_list_of_knobs_that_makes_no_sense_is_a_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()


@given(
    changes=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "optimizer.b2": st.floats(0, 1),
            "model.tie_embeddings": st.booleans(),
            "data.path": st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=8),
            "samples.prompts": st.lists(st.text(max_size=4), min_size=1, max_size=2).map(tuple),
        }
    )
)
def test_words_of_a_run_give_its_values_back(changes):
    """Every value survives the way over train's command line."""
    base = default_config()
    for word in words_of(changes):
        apply_override(base, word)
    assert {name: knob(base, name) for name in changes} == changes


# ---- the list of runs


def test_list_shows_every_run_and_writes_nothing(config, call, tmp_path):
    config(
        "for knobs in sweeps.product({'optimizer.b2': [0.9, 0.95]}, {'seed': [0, 1]}): add(knobs)"
    )
    out, _ = call("--list")
    assert out.splitlines() == [
        f"{i:03d}  missing           optimizer.b2={b2} seed={seed}"
        for i, (b2, seed) in enumerate(itertools.product((0.9, 0.95), (0, 1)))
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["add(sede=1)"],
            "Run 000 of the sweep (sede=1) is impossible: The config has no knob 'sede'. Did you "
            "mean 'seed'?",
        ),
        (["add(seed=1)", "add({'optimizer.b3': 1.0})"], "Did you mean 'optimizer.b2'?"),
        (["add({'optimizer.nmae': 'lion'})"], "Did you mean 'optimizer.name'?"),
        (["add({'optimizer.name': 'lyon'})"], "Did you mean 'lion'?"),
        (["add({'model.num_layers': 1.5})"], "model.num_layers=1.5 is no int"),
        (["add({'model.num_kv_heads': 5})"], "must be a multiple of num_kv_heads=5"),
        (["add(seed=1)", "add(seed=2)", "add(seed=1)"], "Runs 000 and 002 of"),
        (["add()", "add(seed=0)"], "Runs 000 and 001 of"),  # 0 is the default
        (["pass"], "adds no run"),
        (["add(seed=1 / 0)"], "fails with ZeroDivisionError: division by zero"),
    ],
)
def test_an_impossible_sweep_is_refused_before_anything_is_started(
    lines, words, config, call, tmp_path
):
    config(*lines)
    for action in (["--list"], ["--run", "local"], ["--index", "0"]):
        _, err = call(*action, status=2)
        assert words in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_config_without_a_sweep_or_with_both_kinds_is_told_so(config, call):
    config("pass", head="def swep(add):")
    assert "defines neither of sweep(add) and suggest(trial)" in call("--list", status=2)[1]
    config("pass", head="def suggest(trial):\n    return {}\ndef sweep(add):")
    assert "defines both of sweep(add) and suggest(trial)" in call("--list", status=2)[1]


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
def test_flags_that_do_not_go_together_are_a_sentence(flags, words, config, call, tmp_path):
    config(RATES)
    _, err = call(*flags, status=2)
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ---- running


def test_run_local_runs_all_with_their_knobs_each_in_its_workdir(
    config, call, tmp_path, fake_train
):
    config(RATES)
    out, err = call("--run", "local", "--config.seed=5")
    assert out == ""
    assert states(lambda *flags: call(*flags, "--config.seed=5")) == ["complete"] * 3
    for index, rate in enumerate((1e-3, 3e-3, 1e-2)):
        log = (tmp_path / "runs" / f"{index:03d}" / "train.log").read_text()
        assert log == f"fake training seed=5 schedule.learning_rate={rate}\n"
        assert f"{index:03d} complete: {2 + 100 * rate:.3f} bits/byte, step 10/10" in err


def test_a_second_start_runs_only_what_is_not_finished(config, call, tmp_path, fake_train):
    config(RATES, "add(seed=13)", "add(seed=14)")
    _, err = call("--run", "local", status=1)
    assert "1 failed, the first with status 1" in err
    assert f"{tmp_path}/runs/003/train.log tells why" in err
    assert states(call) == ["complete", "complete", "complete", "failed", "diverged"]
    logs = [path.read_text() for path in sorted((tmp_path / "runs").glob("*/train.log"))]
    _, err = call("--run", "local", status=1)
    assert "1 of 5 runs are to be done" in err  # what diverged would diverge again
    again = [path.read_text() for path in sorted((tmp_path / "runs").glob("*/train.log"))]
    assert [after.removeprefix(before) for before, after in zip(logs, again)] == [
        "",
        "",
        "",
        "fake training seed=13\n",
        "",
    ]
    out, _ = call("--list")
    assert out.splitlines()[3:] == [
        "003  failed 0/10       seed=13",
        "004  diverged 5/10     seed=14",
    ]


def test_sigterm_reaches_the_runs_and_the_same_command_continues_them(
    config, call, tmp_path, fake_train
):
    config("for seed in (1, 2, 3): add(seed=seed, num_steps=200)")
    before = signal.getsignal(signal.SIGTERM)
    with stopped_under_way(tmp_path / "runs" / "001"):
        _, err = call("--run", "local", "--parallel", "2", status=42)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "3 of 3 runs left; the same command continues" in err
    first, second, third = json.loads(call("--list", "--json")[0])["runs"]
    assert first["state"] == second["state"] == "partial"
    assert 0 < first["step"] < 200
    assert 16 <= second["step"] < 200
    assert third["state"] == "missing"
    call("--run", "local")
    assert states(call) == ["complete"] * 3
    for index in range(3):  # each step once: the second attempt went on where the first had stopped
        steps = [line["step"] for line in metric_lines(tmp_path / "runs" / f"{index:03d}", "train")]
        assert steps == list(range(1, 201))


def test_parallel_runs_are_never_more_than_asked_for(
    config, call, tmp_path, fake_train, monkeypatch
):
    config("for seed in range(1, 6): add(seed=seed)")
    counts = []
    started = Attempts.start

    def start(self, run, *, to_log):
        started(self, run, to_log=to_log)
        counts.append(sum(attempt.process.poll() is None for attempt in self.under_way))

    monkeypatch.setattr(Attempts, "start", start)
    call("--run", "local", "--parallel", "3")
    assert len(counts) == 5
    assert max(counts) == 3
    assert states(call) == ["complete"] * 5


def test_index_runs_one_run_and_passes_its_exit_status_on(config, call, tmp_path, fake_train):
    config("add(seed=1)", "add(seed=13)", "add(seed=14)")
    call("--index", "0")
    call("--index", "1", status=1)
    call("--index", "2", status=3)
    assert states(call) == ["complete", "failed", "diverged"]
    call("--index", "0")  # complete: the second start has nothing left to do
    assert len(metric_lines(tmp_path / "runs" / "000")) == 13  # 10 train, 1 heldout, 2 final


def test_dry_run_prints_commands_that_train_accepts_and_starts_nothing(config, call, tmp_path):
    import shlex

    from llada_jax.config import load_config

    path = config(
        "add({'samples.prompts': ('a b', \"it's\")}, seed=3)", "add({'data.path': 'x y=0.5,z=0.5'})"
    )
    out, _ = call("--run", "local", "--dry-run", "--config.num_steps=7")
    commands = [shlex.split(line) for line in out.splitlines()]
    assert [command[:4] for command in commands] == [
        [sys.executable, "-m", "llada_jax", "train"]
    ] * 2
    found = [
        load_config(path, [w.removeprefix("--config.") for w in c if w.startswith("--config.")])
        for c in commands
    ]
    assert [c[c.index("--workdir") + 1] for c in commands] == [
        f"{tmp_path}/runs/000",
        f"{tmp_path}/runs/001",
    ]
    assert [f.num_steps for f in found] == [7, 7]
    assert (found[0].samples.prompts, found[0].seed) == (("a b", "it's"), 3)
    assert found[1].data.path == "x y=0.5,z=0.5"
    assert not (tmp_path / "runs").exists()


def test_slurm_gets_one_array_of_what_is_not_finished(config, call, tmp_path, fake_train):
    config(RATES)
    call("--index", "1")
    words = [
        "--run",
        "slurm",
        "--dry-run",
        "--parallel",
        "4",
        "--",
        "--partition",
        "gpu",
        "--time",
        "2:00:00",
    ]
    script, _ = call(*words)
    assert "#SBATCH --array=0,2%4\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    (command,) = [line for line in script.splitlines() if line.startswith("command=(")]
    assert f"llada-jax sweep --config {tmp_path}/config.py --workdir {tmp_path}/runs" in command
    assert command.endswith('--index "$SLURM_ARRAY_TASK_ID")')
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_gke_gets_one_jobset_a_run(config, call):
    config(RATES)
    out, _ = call(
        "--run", "gke", "--dry-run", "--", "--topology", "v5e-16", "--image", "example.org/llada:1"
    )
    manifests = [yaml.safe_load("apiVersion" + part) for part in out.split("apiVersion")[1:]]
    assert [manifest["metadata"]["name"] for manifest in manifests] == [
        "runs-000",
        "runs-001",
        "runs-002",
    ]
    for index, manifest in enumerate(manifests):
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"][:2] == ["llada-jax", "sweep"]
        assert pod["containers"][0]["command"][-2:] == ["--index", str(index)]


def test_a_launcher_that_is_not_there_or_fails_is_told(config, call, monkeypatch, tmp_path):
    config(RATES)
    call("--run", "slurm", "--dry-run", "--", "--no-such-flag", status=2)
    monkeypatch.setattr("llada_jax.sweeps.attempts.LAUNCHERS", tmp_path)
    assert "run it from a clone" in call("--run", "slurm", status=2)[1]


# ---- a changed sweep


def test_a_changed_sweep_is_refused_and_names_the_change(config, call, fake_train):
    config(RATES)
    call("--run", "local")
    config(RATES.replace("3e-3", "5e-3"))
    for action in (["--list"], ["--table"], ["--run", "local"], ["--index", "0"]):
        _, err = call(*action, status=2)
        assert "Run 001" in err
        assert (
            "was begun as schedule.learning_rate=0.003 and is now schedule.learning_rate=0.005"
            in err
        )
    config(RATES.replace(", 1e-2", ""))
    assert "Run 002" in (err := call("--table", status=2)[1])
    assert "is now gone" in err


def test_a_changed_base_is_refused_unless_it_only_changes_how_runs_are_carried_out(
    config, call, fake_train
):
    config(RATES)
    call("--run", "local")
    _, err = call("--list", "--config.optimizer.b2=0.9", status=2)
    assert "have optimizer.b2=0.95, the config has 0.9; undo the change" in err
    for word in (
        "mesh.data=2",
        "log.every_steps=1",
        "checkpoint.every_steps=7",
        "data.num_threads=1",
    ):
        call("--list", f"--config.{word}")


def test_runs_may_be_added_at_the_end(config, call, fake_train):
    config(RATES)
    call("--run", "local")
    config(RATES, "add(seed=9)")
    assert states(call) == ["complete"] * 3 + ["missing"]
    assert "1 of 4 runs are to be done" in call("--run", "local")[1]
    config(RATES)  # and then they are part of it
    assert "Run 003" in call("--list", status=2)[1]


def test_a_sweep_json_that_is_none_is_told(config, call, tmp_path):
    config(RATES)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep.json").write_text("{")
    assert "sweep.json is no JSON" in call("--list", status=2)[1]


# ---- the table


def test_table_has_the_numbers_of_metrics_jsonl_best_first(config, call, tmp_path, fake_train):
    config("for rate in (1e-2, 1e-3, 3e-3): add({'schedule.learning_rate': rate})", "add(seed=14)")
    call("--run", "local")
    table = json.loads(call("--table", "--json")[0])
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
        assert run["curve"] == [
            [5, lines[5]["heldout"]["bits_per_byte"]],
            [10, run["bits_per_byte"]],
        ]
        assert [step for step, _ in run["train_curve"]] == list(range(1, 11))
        assert run["tokens"] == 640
    out, _ = call("--table")
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


def test_table_before_anything_ran_is_a_table(config, call):
    config(RATES)
    lines = call("--table")[0].splitlines()
    assert len(lines) == 4
    assert all("missing" in line for line in lines[1:])
    assert json.loads(call("--table", "--json")[0])["runs"][0]["bits_per_byte"] is None


def result(index, bits, state="complete"):
    curve = [(1, bits + 1), (2, bits)]
    return read_result("nowhere", index=index, knobs={}, num_steps=2)._replace(
        bits_per_byte=bits, state=state, curve=curve, train_curve=curve
    )


def test_effects_are_the_means_by_value_the_strongest_first():
    grid = list(itertools.product((0.9, 0.95), (1, 2, 3)))
    results = [result(i, 10 * b2 + 0.1 * seed) for i, (b2, seed) in enumerate(grid)]
    found = effects(results, [{"b2": b2, "seed": seed, "constant": 1} for b2, seed in grid])
    assert [effect["knob"] for effect in found] == ["b2", "seed"]
    for effect, column in zip(found, zip(*grid)):
        for value in effect["values"]:
            chosen = [r.bits_per_byte for r, v in zip(results, column) if v == value["value"]]
            assert value["mean"] == pytest.approx(np.mean(chosen))
            assert value["best"] == min(chosen)
            assert value["num_runs"] == len(chosen)
        assert effect["is_balanced"]
        assert effect["moves_with"] == []
    assert found[0]["spread"] == pytest.approx(0.5)
    assert found[1]["spread"] == pytest.approx(0.2)


def test_effects_tell_what_cannot_be_told_apart_and_what_is_no_fair_comparison():
    results = [result(i, bits) for i, bits in enumerate((1.0, 2.0, 3.0))]
    together = effects(
        results, [{"layers": n, "width": 32 * n, "name": "abc"[n - 1]} for n in (1, 2, 3)]
    )
    assert {effect["knob"]: set(effect["moves_with"]) for effect in together} == {
        "layers": {"width", "name"},
        "width": {"layers", "name"},
        "name": {"layers", "width"},
    }
    assert [e["rank_correlation"] for e in together if e["knob"] == "name"] == [None]
    lopsided = effects(results, [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2}])
    assert [effect["is_balanced"] for effect in lopsided] == [False, False]


def test_only_complete_runs_are_compared():
    results = [
        result(0, 3.0),
        result(1, 1.0, "partial"),
        result(2, 2.0),
        result(3, 0.5, "diverged"),
        result(4, math.nan),
    ]
    assert [r.index for r in ranked(results)] == [2, 0, 4, 3, 1]
    (effect,) = effects(results, [{"seed": i} for i in range(5)])
    assert [value["value"] for value in effect["values"]] == [0, 2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=2, max_size=20))
def test_rank_correlation_is_spearmans(pairs):
    from scipy.stats import spearmanr

    x, y = zip(*pairs)
    ours = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


def test_sparkline_falls_with_the_curve_and_fits():
    curve = [(step, 8 - step / 25) for step in range(200)]
    line = sparkline(curve, low=0, high=8)
    assert len(line) == 16
    assert list(line) == sorted(line, reverse=True)
    assert (line[0], line[-1]) == ("█", "▁")
    assert sparkline([], low=0, high=1) == ""
    assert sparkline([(1, math.nan), (2, 1.0)], low=1, high=1) == "▁"


def test_curves_are_drawn_into_a_file(config, call, tmp_path, fake_train):
    library("matplotlib")
    config(RATES)
    call("--run", "local")
    call("--table", "--plot", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    call("--table", "--plot", str(tmp_path / "curves.svg"))
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("<path") > 6
    assert (
        "name a .png, .svg or .pdf file"
        in call("--table", "--plot", str(tmp_path / "curves.xyz"), status=2)[1]
    )


def test_fit_of_a_sweep_reads_sizes_and_tokens_from_the_runs(config, call, tmp_path, fake_train):
    """Three budgets on a known parabola, written as train would; the exponent comes out of the
    files.
    """
    config("for i in range(12): add(seed=i)")
    call("--index", "0")
    for index, (compute, factor) in enumerate(
        itertools.product((1e12, 1e13, 1e14), (0.5, 0.8, 1.5, 2.5))
    ):
        d_model = round(64 * (compute / 1e12) ** 0.25 * factor**0.5)
        size = 2 * (
            4 * d_model**2 + 3 * d_model**2
        )  # of an architecture with head_dim 1 and d_ff = d_model
        workdir = tmp_path / "runs" / f"{index:03d}"
        workdir.mkdir(exist_ok=True)
        fields = {
            "vocab_size": 320,
            "num_layers": 2,
            "d_model": d_model,
            "num_heads": d_model,
            "num_kv_heads": d_model,
            "head_dim": 1,
            "d_ff": d_model,
        }
        record = small_record(architecture=Architecture(**fields))
        (workdir / "run.json").write_text(json.dumps(record.to_json()))
        best = 57344 * (compute / 1e12) ** 0.5  # 14 * 64**2
        loss = 3 + 0.1 * math.log(size / best) ** 2
        train = {"step": 10, "train": {"bits_per_byte": 4.0, "tokens": compute / 6 / size}}
        final = {"step": 10, "final": {"nelbo": loss, "bits_per_byte": loss / math.log(2)}}
        (workdir / "metrics.jsonl").write_text(f"{json.dumps(train)}\n{json.dumps(final)}\n")
    fit = json.loads(call("--fit", "--json")[0])
    assert fit["isoflop"]["laws"]["parameters"]["exponent"]["value"] == pytest.approx(0.5, abs=1e-3)
    assert [budget["parameters"] for budget in fit["isoflop"]["budgets"]] == pytest.approx(
        [57344, 57344 * 10**0.5, 573440], rel=1e-2
    )
    out, _ = call("--fit")
    assert "N_opt = " in out
    assert "C^0.500" in out
    assert "these runs do not determine this law" in out  # the parabolas are no sum of two powers


def test_fit_without_enough_runs_is_a_sentence(config, call):
    config(RATES)
    assert "0 finished runs hold no compute budget" in call("--fit", status=2)[1]


def test_a_workdir_with_something_else_in_it_is_told(config, call, tmp_path):
    config(RATES)
    (tmp_path / "runs" / "000").mkdir(parents=True)
    (tmp_path / "runs" / "000" / "metrics.jsonl").write_text("not a metric\n")
    assert "holds a line that is no JSON" in call("--list", status=2)[1]
    (tmp_path / "runs" / "000" / "metrics.jsonl").write_text(
        '{"step": 1, "tr'
    )  # being written at this moment
    assert states(call) == ["missing"] * 3


def test_the_sweep_in_the_docs_is_the_one_that_it_says(call, tmp_path):
    (example, _) = re.findall(
        r"^```python\n(.*?)^```", SCALING.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    (tmp_path / "config.py").write_text(example)
    lines = [line.split("missing")[1].split() for line in call("--list")[0].splitlines()]
    rates = ["schedule.learning_rate=0.0003", "schedule.learning_rate=0.001"]
    sizes = [
        ["model.num_layers=4", "model.d_model=256"],
        ["model.num_layers=8", "model.d_model=512"],
    ]
    assert lines == [["seed=1"], ["optimizer.b2=0.98", "seed=1"]] + [
        [*size, rate] for size in sizes for rate in rates
    ]


# ---- Optuna

SUGGEST = "return {'schedule.learning_rate': trial.suggest_float('rate', 1e-4, 1e-1, log=True), 'num_steps': 20}"


def test_optuna_minimizes_the_held_out_bits_per_byte(config, call, tmp_path, fake_train):
    optuna = library("optuna")
    config(SUGGEST, head="def suggest(trial):")
    _, err = call("--optuna", "8")
    assert "best of 8 trials: " in err
    table = json.loads(call("--table", "--json")[0])
    backend = optuna.storages.journal.JournalFileBackend(f"{tmp_path}/runs/optuna.journal")
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    of_run = {run["index"]: run for run in table["runs"]}
    for trial in finished:  # each trial is the run that its parameters describe
        run = of_run[trial.user_attrs["run"]]
        assert trial.value == run["bits_per_byte"] == pytest.approx(2 + 100 * trial.params["rate"])
    assert table["runs"][0]["bits_per_byte"] == study.best_value
    pruned = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert len(finished) + len(pruned) == 8
    assert sorted(run["state"] for run in table["runs"]) == ["complete"] * len(finished) + [
        "pruned"
    ] * len(pruned)


def test_optuna_prunes_a_run_that_is_worse_than_the_median(config, call, fake_train):
    """The first five trials are never pruned (Optuna's default); the sixth is worse than all of
    them.
    """
    library("optuna")
    config(
        "rate, steps = (1e-1, 400) if trial.number == 5 else (1e-3, 60)",
        "return {'schedule.learning_rate': rate, 'num_steps': steps, 'seed': trial.number}",
        head="def suggest(trial):",
    )
    call("--optuna", "6")
    listed = json.loads(call("--list", "--json")[0])["runs"]
    assert [run["state"] for run in listed] == ["complete"] * 5 + ["pruned"]
    assert listed[5]["step"] < 400
    assert (
        "6 trials" in call("--optuna", "6")[1]
    )  # a pruned trial is over: nothing is started again


def test_optuna_continues_the_trial_that_was_stopped(config, call, tmp_path, fake_train):
    library("optuna")
    config(SUGGEST.replace("20", "300"), head="def suggest(trial):")
    with stopped_under_way(tmp_path / "runs" / "000"):
        assert "asked to stop in trial 0" in call("--optuna", "2", status=42)[1]
    (stopped,) = json.loads(call("--list", "--json")[0])["runs"]
    assert stopped["state"] == "partial"
    call("--optuna", "2")
    first, second = json.loads(call("--list", "--json")[0])["runs"]
    assert first["knobs"] == stopped["knobs"]
    assert first["state"] == second["state"] == "complete"
    assert (
        second["knobs"] != first["knobs"]
    )  # the sampler of the second process did not begin again
    assert [line["step"] for line in metric_lines(tmp_path / "runs" / "000", "train")] == list(
        range(1, 301)
    )


def test_a_suggestion_that_is_impossible_names_the_knob(config, call, fake_train):
    library("optuna")
    config("return {'schedule.laerning_rate': 1.0}", head="def suggest(trial):")
    assert "Did you mean 'schedule.learning_rate'?" in call("--optuna", "2", status=2)[1]
    config("return [1]", head="def suggest(trial):")
    assert "must be given a dict" in call("--optuna", "2", status=2)[1]
    config("return 1 / 0", head="def suggest(trial):")
    assert "suggest(trial) of" in (err := call("--optuna", "2", status=2)[1])
    assert "fails with ZeroDivisionError" in err


def test_optuna_that_is_not_installed_is_answered_by_the_line_that_installs_it(
    config, call, monkeypatch
):
    config(SUGGEST, head="def suggest(trial):")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'llada_jax[optuna]'" in call("--optuna", "2", status=2)[1]


# ---- real training


@pytest.fixture
def real(runs, tmp_path):
    """Returns real(*flags) -> a started `llada-jax sweep` that trains on the small dataset with one
    CPU device.
    """
    knobs = {"data.path": runs.dataset, "log.tensorboard": "false"}
    words = [f"--config.{name}={value}" for name, value in knobs.items()]

    def real(*flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llada_jax",
                "sweep",
                "--config",
                str(tmp_path / "config.py"),
                "--workdir",
                str(tmp_path / "runs"),
                *words,
                *flags,
            ],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    real.words = words
    return real


def error_of(process: subprocess.Popen, *, status: int) -> str:
    _, err = process.communicate(timeout=500)
    assert process.returncode == status, err
    return err


@pytest.mark.slow
def test_a_real_sweep_is_stopped_continues_and_has_the_table_of_its_metrics(
    real, call, config, tmp_path
):
    """SIGTERM in the second run: exit 42; the same command then trains only what was missing, and
    the numbers are train's.
    """
    base = SMALL_RUN.replace("num_steps = 20", "num_steps = 200").replace(
        "every_steps = 10", "every_steps = 50"
    )
    config("for rate in (1e-2, 1e-4): add({'schedule.learning_rate': rate})", base=base)
    process = real("--run", "local")
    second = tmp_path / "runs" / "001" / "metrics.jsonl"
    while process.poll() is None and not (
        second.exists() and len(second.read_text().splitlines()) > 3
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "1 of 2 runs left" in error_of(process, status=42)
    listed = json.loads(call("--list", "--json", *real.words)[0])["runs"]
    assert [run["state"] for run in listed] == ["complete", "partial"]
    assert 3 <= (stopped := listed[1]["step"]) < 200
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "000").rglob("*")}

    assert "1 of 2 runs are to be done" in error_of(real("--run", "local"), status=0)
    assert untouched == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "000").rglob("*")
    }
    log = (tmp_path / "runs" / "001" / "train.log").read_text()
    assert f"step {stopped} of 200 is saved" in log
    assert f"step {stopped + 1}/200" in log

    table = json.loads(call("--table", "--json", *real.words)[0])
    assert [run["index"] for run in table["runs"]] == [0, 1]  # 1e-4 has learnt less in 200 steps
    for run in table["runs"]:
        lines = metric_lines(run["workdir"])
        assert [line["step"] for line in lines if "train" in line] == list(range(1, 201))
        assert run["bits_per_byte"] == lines[-1]["final"]["bits_per_byte"]
        assert run["tokens"] == 200 * 16 * 32
        trained = json.loads((Path(run["workdir"]) / "run.json").read_text())["config"]
        assert trained["schedule"]["learning_rate"] == run["knobs"]["schedule.learning_rate"]
    (effect,) = table["effects"]
    assert effect["spread"] == pytest.approx(
        table["runs"][1]["bits_per_byte"] - table["runs"][0]["bits_per_byte"]
    )


@pytest.mark.slow
def test_optuna_drives_real_training(real, call, config):
    library("optuna")
    config(
        "return {'optimizer.b2': trial.suggest_float('b2', 0.9, 0.99)}",
        head="def suggest(trial):",
        base=SMALL_RUN,
    )
    assert "best of 2 trials" in error_of(real("--optuna", "2"), status=0)
    listed = json.loads(call("--list", "--json", *real.words)[0])["runs"]
    assert [run["state"] for run in listed] == ["complete", "complete"]
    for run in listed:
        trained = json.loads((Path(run["workdir"]) / "run.json").read_text())["config"]
        assert trained["optimizer"]["b2"] == run["knobs"]["optimizer.b2"]
