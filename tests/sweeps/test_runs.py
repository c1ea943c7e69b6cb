"""The runs of a sweep: which there are, what is refused, and what sweep.json protects."""

import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import error_of
from support.processes import run_without_privileges
from support.sweeps import RATES, listed, states

from llada_jax.config import apply_override, default_config
from llada_jax.storage import remote
from llada_jax.sweeps.runs import as_overrides, read_sweep_json
from llada_jax.validation import knob


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
def test_overrides_of_a_run_give_its_values_back(changes):
    """Every value survives the way over train's command line."""
    base = default_config()
    for word in as_overrides(changes):
        apply_override(base, word)
    assert {name: knob(base, name) for name in changes} == changes


def test_list_shows_every_run_and_writes_nothing(write_config, call_sweep, tmp_path):
    write_config(
        "for knobs in sweeps.product({'optimizer.b2': [0.9, 0.95]}, {'seed': [0, 1]}): add(knobs)"
    )
    out, _ = call_sweep("--list")
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
        (["add({'model.num_layers': 1.5})"], "model.num_layers=1.5 is not of type int"),
        (["add({'model': {'num_layers': 2}})"], "no knob 'model', which is a group of knobs"),
        (["add(seed={1, 2})"], "seed={1, 2} is not of type int"),
        (["add({'model.num_kv_heads': 5})"], "must be a multiple of num_kv_heads=5"),
        (["add(seed=1)", "add(seed=2)", "add(seed=1)"], "Runs 000 and 002 of"),
        (["add()", "add(seed=0)"], "Runs 000 and 001 of"),  # 0 is the default
        (["pass"], "adds no run"),
        # a status of its own would mean something else
        (["raise SystemExit(3)"], "fails with SystemExit: 3"),
        (["add(seed=1 / 0)"], "fails with ZeroDivisionError: division by zero"),
    ],
)
def test_an_impossible_sweep_is_refused_before_anything_is_started(
    lines, words, write_config, call_sweep, tmp_path
):
    write_config(*lines)
    for action in (["--list"], ["--run", "local"], ["--index", "0"]):
        _, err = call_sweep(*action, status=2)
        assert words in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_config_without_a_sweep_or_with_both_kinds_is_refused(write_config, call_sweep):
    write_config("pass", head="def swep(add):")
    assert "defines neither of sweep(add) and suggest(trial)" in call_sweep("--list", status=2)[1]
    write_config("pass", head="def suggest(trial):\n    return {}\ndef sweep(add):")
    assert "defines both of sweep(add) and suggest(trial)" in call_sweep("--list", status=2)[1]


def test_a_changed_sweep_is_refused_and_names_the_change(write_config, call_sweep, fake_train):
    write_config(RATES)
    call_sweep("--run", "local")
    write_config(RATES.replace("3e-3", "5e-3"))
    for action in (["--list"], ["--table"], ["--run", "local"], ["--index", "0"]):
        _, err = call_sweep(*action, status=2)
        assert "Run 001" in err
        assert "was begun with schedule.learning_rate=0.003, which" in err
    write_config(RATES.replace(", 1e-2", ""))
    assert "Run 002" in (err := call_sweep("--table", status=2)[1])
    assert "no longer adds" in err


def test_a_changed_base_is_refused_unless_it_only_changes_how_runs_are_carried_out(
    write_config, call_sweep, fake_train
):
    write_config(RATES)
    call_sweep("--run", "local")
    _, err = call_sweep("--list", "--config.optimizer.b2=0.9", status=2)
    assert "have optimizer.b2=0.95, the config has 0.9; undo the change" in err
    for word in (
        "mesh.data=2",
        "log.every_steps=1",
        "checkpoint.every_steps=7",
        "data.num_threads=1",
    ):
        call_sweep("--list", f"--config.{word}")


@pytest.mark.slow
def test_runs_may_be_added_at_the_end(write_config, call_sweep, fake_train):
    write_config(RATES)
    call_sweep("--run", "local")
    write_config(RATES, "add(seed=9)")
    assert states(call_sweep) == ["complete"] * 3 + ["missing"]
    assert "1 of 4 runs are to be done" in call_sweep("--run", "local")[1]
    write_config(RATES)  # and then they are part of it
    assert "Run 003" in call_sweep("--list", status=2)[1]


@pytest.mark.slow
def test_runs_keep_their_numbers_when_a_value_is_added_in_the_middle_of_a_product(
    write_config, call_sweep, fake_train
):
    product = "for knobs in sweeps.product({'seed': [1, 2]}, {'optimizer.b2': [0.9, 0.98]}): "
    write_config(product + "add(knobs)")
    call_sweep("--run", "local")
    before = listed(call_sweep)
    write_config(product.replace("[0.9,", "[0.5, 0.9,").replace("[1,", "[3, 1,") + "add(knobs)")
    after = listed(call_sweep)
    assert after[:4] == before
    assert [run["index"] for run in after] == list(range(9))
    assert [run["knobs"] for run in after[4:]] == [
        {"seed": 3, "optimizer.b2": 0.5},
        {"seed": 3, "optimizer.b2": 0.9},
        {"seed": 3, "optimizer.b2": 0.98},
        {"seed": 1, "optimizer.b2": 0.5},
        {"seed": 2, "optimizer.b2": 0.5},
    ]
    assert "5 of 9 runs are to be done" in call_sweep("--run", "local")[1]
    assert listed(call_sweep)[:4] == before


def test_a_knob_may_be_added_to_all_runs_with_the_value_that_it_had(
    write_config, call_sweep, fake_train
):
    write_config("for seed in (1, 2): add(seed=seed)")
    call_sweep("--run", "local")
    # 0.95 is what the config has: the runs with it are those that are done
    write_config(
        "for knobs in sweeps.product({'optimizer.b2': [0.9, 0.95]}, {'seed': [1, 2]}): add(knobs)"
    )
    assert states(call_sweep) == ["complete"] * 2 + ["missing"] * 2
    assert [run["knobs"]["optimizer.b2"] for run in listed(call_sweep)] == [0.95, 0.95, 0.9, 0.9]


def test_a_run_that_is_added_twice_is_refused_after_it_was_begun(
    write_config, call_sweep, fake_train
):
    write_config("add(seed=1)")
    call_sweep("--run", "local")
    write_config("add(seed=2)", "add(seed=1)", "add(seed=1)")
    assert "are the same (seed=1)" in call_sweep("--list", status=2)[1]


def test_a_sweep_of_an_older_version_loads(write_config, call_sweep, tmp_path, fake_train):
    """sweep.json as version 0.1.0 wrote it: the order of its list is that of the workdirs."""
    write_config(RATES)
    call_sweep("--index", "1")
    content = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert content["runs"] == [{"schedule.learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
    # the base of an older version lacks knobs that came later
    del content["base"]["evaluation.final_num_batches"]
    # and has the defaults of its time
    content["base"]["model.remat"] = "none"
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(content))
    assert states(call_sweep) == ["missing", "complete", "missing"]
    content["base"]["evaluation.final_num_batches"] = 0
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps(content))
    err = call_sweep("--list", status=2)[1]
    assert "have evaluation.final_num_batches=0, the config has " in err
    assert "another version had another default: set that of the runs), or give a new" in err


def test_a_damaged_sweep_json_is_reported(write_config, call_sweep, tmp_path):
    write_config(RATES)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep.json").write_text("{")
    assert "sweep.json is not the record of a sweep" in call_sweep("--list", status=2)[1]


def test_a_workdir_with_something_else_in_it_is_reported(write_config, call_sweep, tmp_path):
    write_config(RATES)
    (tmp_path / "runs" / "000").mkdir(parents=True)
    (tmp_path / "runs" / "000" / "metrics.jsonl").write_text("not a metric\n")
    assert states(call_sweep) == ["damaged", "missing", "missing"]
    table, _ = call_sweep("--table")
    assert "damaged" in table
    # a line that is being written at this moment
    (tmp_path / "runs" / "000" / "metrics.jsonl").write_text('{"step": 1, "tr')
    assert states(call_sweep) == ["missing"] * 3


@pytest.mark.slow
def test_what_another_user_has_hidden_is_not_called_missing(
    write_config, call_sweep, tmp_path, fake_train
):
    config, runs = write_config("add(seed=1)", "add(seed=2)", "add(seed=14)"), tmp_path / "runs"
    call_sweep("--run", "local")
    words = ["sweep", "--config", config, "--workdir", str(runs), "--list"]
    command = [sys.executable, "-m", "llada_jax", *words]
    hidden = [runs / "000" / "metrics.jsonl", runs / "001"]
    for path in hidden:
        path.chmod(0)
    try:
        listed = run_without_privileges(command)
        hidden.append(runs)
        runs.chmod(0)
        refused = run_without_privileges(command)
    finally:
        for path in reversed(hidden):
            path.chmod(0o700)
    assert [line.split()[1] for line in listed.stdout.splitlines()] == [
        "unreadable",
        "unreadable",
        "diverged",
    ]
    assert refused.returncode == 2
    assert f"{runs}/sweep.json cannot be read (Permission denied)" in refused.stderr


def test_a_bucket_that_does_not_answer_is_reported(monkeypatch):
    def fail(path):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(remote.epath.Path("gs://bucket").__class__, "exists", fail)
    remote._connect.cache_clear()
    assert "gs://bucket cannot be reached" in error_of(read_sweep_json, "gs://bucket/runs")
