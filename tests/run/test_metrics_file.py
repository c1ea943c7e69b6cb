"""Sums to means, metrics.jsonl over interruptions, and TensorBoard as it reads the events."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.required import library

from llada_jax.errors import UserError
from llada_jax.run import metrics_file
from llada_jax.run.metrics_file import (
    MetricsWriter,
    bound_of,
    is_over,
    last_bound,
    means,
    read_lines,
    read_samples,
    remote,
)
from llada_jax.samplers.text import Completion

# ---- sums to means


def test_means_divide_sums_by_counts_on_the_host():
    sums = {"loss": (np.float32(6.0), np.float32(4.0)), "grad_norm": (3.0, 2)}
    assert means(sums) == {"loss": 1.5, "grad_norm": 1.5}
    assert all(type(value) is float for value in means(sums).values())


def test_vectors_of_sums_become_numbered_means_without_empty_buckets():
    sums = {"nll_by_t": (jnp.arange(10.0), jnp.array([0.0, 2, 2, 2, 2, 0, 2, 2, 2, 2]))}
    assert means(sums) == {f"nll_t{i}": i / 2 for i in (1, 2, 3, 4, 6, 7, 8, 9)}


def test_what_was_never_counted_is_left_out():
    assert means({"masked_accuracy": (0.0, 0.0)}) == {}


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 1000)), min_size=1, max_size=20))
def test_sums_of_parts_give_the_mean_of_the_whole(parts):
    total, count = sum(p[0] for p in parts), sum(p[1] for p in parts)
    assert means({"loss": (np.float64(total), count)})["loss"] == pytest.approx(total / count)


# ---- on disk


def write_steps(writer, steps, *, speed):
    for step in steps:
        writer.write(
            step,
            {
                "train": {"loss": 1 / step, "nelbo": math.pi * step},
                "speed": {"tokens_per_s": speed},
            },
        )
        if step % 20 == 0:
            writer.write(step, {"heldout": {"nelbo": 2.0 / step}})


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(entries):
    return [{key: value for key, value in entry.items() if key != "speed"} for entry in entries]


def test_lines_hold_the_step_first_and_full_precision(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(40, {"train": {"loss": np.float32(0.1)}, "speed": {"tokens_per_s": 5}})
    writer.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (
        text
        == '{"step": 40, "train": {"loss": 0.10000000149011612}, "speed": {"tokens_per_s": 5.0}}\n'
    )


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(10, {"train": {"loss": 1.0}})
    assert lines_of(tmp_path) == [{"step": 10, "train": {"loss": 1.0}}]


def test_numbers_that_json_lacks_are_written_as_text(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"train": {"loss": float("nan"), "grad_norm": np.float32("inf")}})
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert lines_of(tmp_path)[0]["train"] == {"loss": "nan", "grad_norm": "inf"}


@given(stop=st.integers(1, 9), resume=st.integers(0, 9), cut=st.integers(0, 40))
def test_an_interrupted_and_resumed_run_leaves_the_file_of_a_straight_one(
    tmp_path_factory, stop, resume, cut
):
    """Killed after `stop` lines with `cut` characters of another, resumed from the checkpoint
    before.
    """
    straight, broken = (tmp_path_factory.mktemp(name) for name in ("straight", "broken"))
    writer = MetricsWriter(straight, tensorboard=False)
    write_steps(writer, range(10, 110, 10), speed=1.0)
    writer.close()
    checkpoint = min(stop, resume) * 10
    writer = MetricsWriter(broken, tensorboard=False)
    write_steps(writer, range(10, 10 * stop + 10, 10), speed=2.0)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "train": {"loss": 0.009090909}}'[:cut])
    writer = MetricsWriter(broken, tensorboard=False, resume_step=checkpoint)
    write_steps(writer, range(checkpoint + 10, 110, 10), speed=3.0)
    writer.close()
    assert without_speed(lines_of(broken)) == without_speed(lines_of(straight))
    assert os.listdir(broken) == ["metrics.jsonl"]


def test_a_line_that_lacks_its_end_joins_no_other(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=20)
    writer.write(30, {})
    assert [entry["step"] for entry in read_lines(tmp_path)] == [10, 30]


def test_a_resumed_run_drops_the_samples_that_it_will_take_again(tmp_path):
    def sample(writer, step):
        text = Completion("<a>", f" at {step}\n", [], 1)
        writer.samples(step, [text, text._replace(prompt="")])

    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert read_samples(tmp_path) == []
    for step in (20, 40, 60):
        sample(writer, step)
    writer.close()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 80, "pro')
    writer = MetricsWriter(tmp_path, resume_step=40, tensorboard=False)
    assert [writer.lacks_samples(step) for step in (20, 40, 60)] == [False, False, True]
    assert [text["step"] for text in read_samples(tmp_path)] == [20, 20, 40, 40]
    sample(writer, 60)
    writer.close()
    assert read_samples(tmp_path)[-2:] == [
        {"step": 60, "prompt": "<a>", "text": " at 60\n"},
        {"step": 60, "prompt": "", "text": " at 60\n"},
    ]
    (tmp_path / "samples.jsonl").write_text('{"step": 60, "prompt": 3, "text": ""}\n')
    with pytest.raises(UserError, match="samples.jsonl line 1 is not a line of samples"):
        read_samples(tmp_path)


def test_lines_survive_kill_minus_9(tmp_path):
    code = (
        "import sys, time; from llada_jax.run.metrics_file import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1]); w.write(1, {'train': {'loss': 1.0}}); print('written', "
        "flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lines_of(tmp_path) == [{"step": 1, "train": {"loss": 1.0}}]


def test_a_start_from_scratch_drops_an_earlier_attempt(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(0, {"heldout": {"nelbo": 6.0}})
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    writer.write(0, {"heldout": {"nelbo": 6.0}})
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize("content", ["loss,step\n1,2\n", "[1]\n{}\n", b"\xff\xfe\x00binary\n"])
def test_a_foreign_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"metrics.jsonl line 1 is not a line of metrics.*move it away"
    ):
        MetricsWriter(tmp_path)
    assert path.read_bytes() == before


def test_a_run_is_over_when_its_last_step_has_its_bound(tmp_path):
    assert read_lines(tmp_path) == []
    writer = MetricsWriter(tmp_path, tensorboard=False)
    write_steps(writer, [10, 20], speed=1.0)
    assert not is_over(read_lines(tmp_path), 20)
    writer.write(20, {"final_books": {"nelbo": 1.0}})
    writer.close()
    lines = read_lines(tmp_path)
    assert lines[-1] == {"step": 20, "final_books": {"nelbo": 1.0}}
    assert is_over(lines, 20)
    assert not is_over(lines, 10)
    assert not is_over(lines, 30)


def test_the_bound_of_a_step_is_the_last_one_before_it():
    lines = [
        {"step": 1, "train": {}},
        {"step": 2, "heldout": {"nelbo": 2.0}},
        {"step": 4, "final": {"nll": 1.0, "standard_error": "nan"}},
    ]
    assert last_bound(lines, 1) is None
    assert last_bound(lines, 3)["nats_per_token"] == 2.0
    last = last_bound(lines, 4)
    assert (last["step"], last["name"], last["num_splits"]) == (4, "nll", 1)
    assert all(math.isnan(last[name]) for name in ("bits_per_byte", "nats_error", "bits_error"))


def test_the_bound_of_a_mixture_is_the_mean_over_its_splits():
    splits = {
        "final_0_a": {"nelbo": 3.0, "standard_error": 0.03, "bits_per_byte": 6.0},
        "final_1_b": {"nelbo": 1.0, "standard_error": 0.04, "bits_per_byte": 1.0},
    }
    assert bound_of({"step": 7, **splits}, "heldout") is None
    assert bound_of({"step": 7, **splits}, "final") == pytest.approx(
        {
            "name": "nelbo",
            "nats_per_token": 2.0,
            "bits_per_byte": 3.5,
            "nats_error": 0.025,
            "bits_error": math.hypot(0.06, 0.04) / 2,
            "num_splits": 2,
        }
    )


def test_a_half_written_last_line_is_not_read_and_no_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a line of metrics"):
        read_lines(tmp_path)


@pytest.mark.parametrize("step", ["2.0", '"2"', "true", "null"])
def test_a_line_whose_step_is_damaged_is_left_out_so_that_the_rest_can_be_read(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": {step}}}\n{{"step": 3}}\n')
    damaged = path.read_text()
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=3)
    writer.close()
    (sentence,) = writer.damage
    assert "1 of 3 lines cannot be read, the first of them line 2" in sentence
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == damaged
    assert read_lines(tmp_path) == [{"step": 1}, {"step": 3}]


def test_lines_that_the_system_refuses_to_read_are_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read \(Is a dir.*permissions"):
        read_lines(tmp_path)


def test_only_the_first_process_writes(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False)
    writer.write(1, {"train": {"loss": 1.0}})
    writer.text(1, "samples", "text")
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_sentence_with_the_remedy(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, tensorboard=False)

    class FullFile:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer._metrics, "_file", FullFile())
    says = rf"{tmp_path} cannot be written \(No space left.*free some space"
    with pytest.raises(UserError, match=says) as error:
        writer.write(1, {"train": {"loss": 1.0}})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_tensorboard_ends_the_run_and_does_not_hang(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer._events._file._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(1, {"train": {"loss": 1.0}})


def test_a_workdir_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run cannot be written .*choose another --workdir"):
        MetricsWriter(tmp_path / "file" / "run")


def take_for_remote(monkeypatch) -> None:
    """A local path stands in for the object store: what is tested is the way without appending (and
    see test_remote).
    """
    monkeypatch.setattr(remote, "is_remote", lambda path: True)
    monkeypatch.setattr(remote, "path_of", Path)


def test_a_remote_workdir_is_written_whole_at_each_flush(tmp_path, monkeypatch):
    take_for_remote(monkeypatch)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    write_steps(writer, range(10, 60, 10), speed=1.0)
    writer.samples(50, [Completion("", "text", [], 1)])
    assert not list(tmp_path.iterdir())
    writer.flush()
    assert read_samples(tmp_path) == [{"step": 50, "prompt": "", "text": "text"}]
    assert [entry["step"] for entry in lines_of(tmp_path)] == [10, 20, 20, 30, 40, 40, 50]
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=20)
    write_steps(writer, [30], speed=1.0)
    writer.close()
    assert [entry["step"] for entry in lines_of(tmp_path)] == [10, 20, 20, 30]


def test_lines_wait_in_memory_no_longer_than_the_flush_interval(tmp_path, monkeypatch):
    take_for_remote(monkeypatch)
    seconds = [0.0]
    monkeypatch.setattr(metrics_file.time, "monotonic", lambda: seconds[0])
    writer = MetricsWriter(tmp_path, tensorboard=False)
    found = []
    for step in range(1, 7):
        seconds[0] += 0.6 * metrics_file.FLUSH_SECONDS
        writer.write(step, {"train": {"loss": 1.0}})
        is_written = (tmp_path / "metrics.jsonl").exists()
        found.append(len(lines_of(tmp_path)) if is_written else 0)
    # each flush sends the whole text, and so there is one per interval and not one per line
    assert found == [0, 2, 2, 4, 4, 6]


def test_tensorboard_reads_the_scalars_and_texts_of_a_resumed_run_once(tmp_path):
    event_accumulator = library("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path)
    write_steps(writer, range(10, 60, 10), speed=1.0)
    writer.text(20, "samples/0", "*once* upon")
    writer.close()
    writer = MetricsWriter(tmp_path, resume_step=30)
    write_steps(writer, range(40, 70, 10), speed=2.0)
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "1_train/loss",
        "1_train/nelbo",
        "2_heldout/nelbo",
        "9_speed/tokens_per_s",
    }
    assert [event.step for event in events.Scalars("1_train/loss")] == [10, 20, 30, 40, 50, 60]
    assert [event.value for event in events.Scalars("9_speed/tokens_per_s")] == [1, 1, 1, 2, 2, 2]
    assert events.Scalars("1_train/nelbo")[-1].value == pytest.approx(60 * math.pi)
    (text_tag,) = tags["tensors"]
    assert text_tag.startswith("samples/0")
    assert events.Tensors(text_tag)[0].tensor_proto.string_val == [b"*once* upon"]
