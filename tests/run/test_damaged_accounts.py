"""Files of accounting that are damaged: they are said and do not stop a run, or stop it in one
sentence where a guess would change its data.
"""

import json

import pytest
from support.errors import error_of

from llada_jax.run import goodput
from llada_jax.run.clock import Clock
from llada_jax.run.goodput import Ledger
from llada_jax.run.metrics_file import MetricsWriter, read_lines
from llada_jax.run.rollbacks import Rollbacks, read_rollbacks, write_rollbacks
from llada_jax.sweeps.results import read_result
from llada_jax.sweeps.runs import read_sweep_json

TOO_DEEP = "[" * 100_000 + "]" * 100_000
WRONG = ["", "{", "[]", "null", "3", '"text"', "{}", '{"count": 1}', "\x00" * 40, TOO_DEEP]


@pytest.mark.parametrize(
    "content",
    [
        *WRONG,
        '{"first_start": 0, "last": 1, "seconds": [], "marks": []}',
        '{"first_start": 0, "last": 1, "seconds": {"step": NaN}, "marks": []}',
        '{"first_start": 0, "last": 1, "seconds": {}, "marks": [1]}',
    ],
)
def test_a_damaged_account_of_time_is_reported_and_begins_again(content, tmp_path):
    (tmp_path / "goodput.json").write_text(content)
    said = []
    ledger = Ledger(tmp_path, Clock(), start_step=5, say=said.append)
    assert len(said) == 1
    assert "goodput.json cannot be read" in said[0]
    ledger.mark(6)
    again = []
    Ledger(tmp_path, Clock(), start_step=6, say=again.append)
    assert again == []


def test_a_disk_that_refuses_the_account_is_said_once_each_time_and_stops_nothing(
    tmp_path, monkeypatch
):
    said = []
    ledger = Ledger(tmp_path, Clock(), start_step=0, say=said.append)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(goodput.files, "write_whole", full)
            ledger.mark(10 * number + 1)
            ledger.mark(10 * number + 2)
        assert len(said) == number
        assert "No space left" in said[-1]
        ledger.mark(10 * number + 3)
        kept = json.loads((tmp_path / "goodput.json").read_text())
        assert kept["marks"][-1][0] == 10 * number + 3


@pytest.mark.parametrize(
    "content",
    [
        *WRONG,
        '{"count": 1, "skipped": [[3]]}',
        '{"count": 1, "skipped": [[5, 3]]}',
        '{"count": 1, "skipped": [[0, 3]]}',
        '{"count": -1, "skipped": []}',
        '{"count": 1e999, "skipped": []}',
    ],
)
def test_a_damaged_list_of_rollbacks_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "rollbacks.json").write_text(content)
    assert "rollbacks.json cannot be read" in error_of(read_rollbacks, tmp_path)


def test_rollbacks_read_back_as_written(tmp_path):
    write_rollbacks(tmp_path, Rollbacks(2, ((5, 8), (11, 11))))
    assert read_rollbacks(tmp_path) == Rollbacks(2, ((5, 8), (11, 11)))


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "{}", '{"step": "4"}', '{"step": null}', '{"step": true}', TOO_DEEP],
)
def test_a_damaged_line_of_metrics_is_refused_with_its_number(line, tmp_path):
    lines = ['{"step": 1}', line, '{"step": 3}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert "metrics.jsonl line 2 is not a line of metrics" in error_of(read_lines, tmp_path)


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"step": Infinity}', TOO_DEEP, "\udcff"])
def test_a_run_continues_without_the_damaged_lines_of_its_log(line, tmp_path):
    damaged = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode("utf-8", "surrogateescape")
    for name in ("metrics", "samples"):
        (tmp_path / f"{name}.jsonl").write_bytes(damaged)
    writer = MetricsWriter(tmp_path, resume_step=3, tensorboard=False)
    writer.write(4, {"train": {"loss": 1.0}})
    writer.close()
    assert [entry["step"] for entry in read_lines(tmp_path)] == [1, 3, 4]
    assert len(writer.damage) == 2
    for name, said in zip(("metrics", "samples"), writer.damage):
        assert f"{name}.jsonl: 1 of 3 lines cannot be read, the first of them line 2" in said
        assert (tmp_path / f"{name}.jsonl.damaged").read_bytes() == damaged
    again = MetricsWriter(tmp_path, resume_step=4, tensorboard=False)
    again.close()
    assert again.damage == []
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write("{\n" + '{"step": 5}\n')
    (said,) = MetricsWriter(tmp_path, resume_step=5, tensorboard=False).damage
    assert "metrics.jsonl.damaged-2 keeps the file" in said
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_file_of_metrics_without_any_line_has_none(tmp_path):
    assert read_lines(tmp_path) == []
    for text in ("", "\n"[:0], '{"step": 1'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert read_lines(tmp_path) == []


def test_lines_that_are_missing_before_the_first_step_are_said(tmp_path):
    def gap(steps, start, num_unlogged=0):
        lines = [json.dumps({"step": step, "train": {"loss": 1.0}}) for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        writer = MetricsWriter(tmp_path, resume_step=start, tensorboard=False)
        found = writer.gap_before(start, num_unlogged=num_unlogged)
        writer.close()
        return found

    assert gap([10, 20], 20) == gap([10, 20], 25, 5) == gap([10, 20, 30], 20) == gap([], 9, 9) == ""
    assert "no lines of steps 11 to 20" in gap([10], 25, 5)
    assert "no lines of steps 1 to 20" in gap([], 20)


@pytest.mark.parametrize(
    "line", ["not JSON", "[]", '{"step": 1, "train": 3}', '{"step": 1, "final": {}}']
)
def test_one_damaged_run_has_no_result_and_raises_nothing(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    result = read_result(tmp_path, index=0, knobs={}, num_steps=4)
    assert (result.state, result.step, result.curve) == ("damaged", 0, [])


@pytest.mark.parametrize("content", WRONG)
def test_a_damaged_exit_status_counts_as_an_interruption(content, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "train": {"bits_per_byte": 1.0, "tokens": 5}}) + "\n"
    )
    (tmp_path / "exit.json").write_text(content)
    assert read_result(tmp_path, index=0, knobs={}, num_steps=4).state == "partial"


@pytest.mark.parametrize("content", [*WRONG, '{"base": {}, "runs": [1]}'])
def test_a_damaged_record_of_a_sweep_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    assert "sweep.json is not the record of a sweep" in error_of(read_sweep_json, tmp_path)
