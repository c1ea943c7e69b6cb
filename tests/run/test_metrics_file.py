"""Sums to means, the clock, metrics.jsonl over interruptions, TensorBoard as it reads the events,
the display.
"""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.required import library

from llada_jax.errors import UserError
from llada_jax.models.flops import flops_per_token
from llada_jax.run import metrics_file
from llada_jax.run.clock import Clock, host_rss_bytes, speed_metrics
from llada_jax.run.metrics_file import MetricsWriter, is_over, means, read_lines, remote
from llada_jax.run.progress import Progress, summary_line
from llada_jax.units import bits_per_byte, format_bytes, format_count, format_seconds

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


def test_a_uniform_model_over_bytes_scores_eight_bits_a_byte():
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2.0)


# ---- analytic operations


@pytest.mark.parametrize(
    ("n", "layers", "d", "length", "matmul_gflop", "attention_gflop"),
    [
        (8_015_581_184 - 126_464 * 4096, 32, 4096, 4096, 45.0, 6.44),  # LLaDA-8B
        (8_030_261_248 - 128_256 * 4096, 32, 4096, 8192, 45.03, 12.88),  # Llama-3.1-8B
    ],
)
def test_operations_of_published_models(n, layers, d, length, matmul_gflop, attention_gflop):
    full = flops_per_token(n, layers, d, length)
    assert full == pytest.approx((matmul_gflop + attention_gflop) * 1e9, rel=1e-3)
    assert flops_per_token(n, layers, d, length, causal=True) == pytest.approx(
        full - attention_gflop / 2 * 1e9, rel=1e-3
    )


def test_operations_agree_with_what_xla_counts():
    """A dense network of matrices and attention; the rest that XLA counts (softmax, relu, adds) is
    a few percent.
    """
    L, D, N, H, F, V, B, T = 2, 128, 2, 64, 512, 512, 2, 128

    def loss(params, x):
        for p in params["blocks"]:
            q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
            probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
            x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", probs, v), p["o"])
            x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        return jnp.sum(x @ params["head"])

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    block = {
        **{name: leaf(D, N, H) for name in "qkv"},
        "o": leaf(N, H, D),
        "up": leaf(D, F),
        "down": leaf(F, D),
    }
    params = {"blocks": [block] * L, "head": leaf(D, V)}
    num_params = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, leaf(B, T, D)).compile()
    counted = step.cost_analysis()["flops"] / (B * T)
    assert flops_per_token(num_params, L, N * H, T) == pytest.approx(counted, rel=0.05)


# ---- timing


class FakeTime:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_every_second_belongs_to_one_activity():
    passing = FakeTime()
    clock = Clock(now=passing)
    passing.passes(3)
    with clock.span("compile"):
        passing.passes(10)
    clock.start_training()
    passing.passes(20)
    with clock.span("evaluation"):
        passing.passes(4)
        with clock.span("data"):  # takes its second from evaluation
            passing.passes(1)
        passing.passes(2)
    passing.passes(60)
    assert clock.seconds() == {"init": 3, "compile": 10, "step": 80, "evaluation": 6, "data": 1}
    assert sum(clock.seconds().values()) == passing.now - 100


def test_a_span_that_fails_is_accounted_too():
    passing = FakeTime()
    clock = Clock(now=passing)

    @clock.span("checkpoint")
    def fail():
        passing.passes(5)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    passing.passes(1)
    assert clock.seconds() == {"init": 1, "checkpoint": 5}


def test_speed_is_over_the_interval_and_leaves_out_what_is_no_training():
    passing = FakeTime()
    clock = Clock(now=passing)
    passing.passes(1000)
    clock.start_training()
    clock.interval()
    for _ in range(2):  # two intervals of the same length report the same numbers
        with clock.span("data"):
            passing.passes(1)
        passing.passes(9)
        with clock.span("checkpoint"):
            passing.passes(50)
        speed = speed_metrics(
            clock,
            num_steps=20,
            tokens_per_step=512,
            flops_per_token=1e9,
            num_devices=4,
            peak_flops=1e12,
        )
        assert speed["tokens_per_s"] == pytest.approx(1024)
        assert speed["step_s"] == pytest.approx(0.5)
        assert speed["data_wait_share"] == pytest.approx(0.1)
        assert speed["tflops_per_device"] == pytest.approx(0.256)
        assert speed["mfu"] == pytest.approx(0.256)
        assert speed["rss_gib"] > 0.01


def test_no_utilisation_is_reported_for_unknown_hardware():
    clock = Clock()
    clock.start_training()
    speed = speed_metrics(
        clock, num_steps=1, tokens_per_step=1, flops_per_token=1.0, num_devices=1, peak_flops=None
    )
    assert "mfu" not in speed
    assert None not in speed.values()


def test_memory_of_the_process_grows_by_what_is_allocated():
    before = host_rss_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    grown = host_rss_bytes() - before
    assert block.nbytes * 0.8 < grown < block.nbytes * 2


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
    writer._file.write('{"step": 110, "train": {"loss": 0.009090909}}'[:cut])
    writer._file.flush()
    writer = MetricsWriter(broken, tensorboard=False, resume_step=checkpoint)
    write_steps(writer, range(checkpoint + 10, 110, 10), speed=3.0)
    writer.close()
    assert without_speed(lines_of(broken)) == without_speed(lines_of(straight))
    assert os.listdir(broken) == ["metrics.jsonl"]


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
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is no metrics line.*move it away"):
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
    assert not is_over(lines, 30)


def test_a_half_written_last_line_is_not_read_and_no_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match="holds a line that is no JSON"):
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

    monkeypatch.setattr(writer, "_file", FullFile())
    with pytest.raises(UserError, match=rf"disk of {tmp_path} is full.*free some space") as error:
        writer.write(1, {"train": {"loss": 1.0}})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_tensorboard_ends_the_run_and_does_not_hang(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer._events._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match="is full"):
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
    assert not (tmp_path / "metrics.jsonl").exists()
    writer.flush()
    assert [entry["step"] for entry in lines_of(tmp_path)] == [10, 20, 20, 30, 40, 40, 50]
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=20)
    write_steps(writer, [30], speed=1.0)
    writer.close()
    assert [entry["step"] for entry in lines_of(tmp_path)] == [10, 20, 20, 30]


def test_lines_wait_in_memory_no_longer_than_the_flush_interval(tmp_path, monkeypatch):
    take_for_remote(monkeypatch)
    monkeypatch.setattr(metrics_file, "FLUSH_SECONDS", 0.0)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    time.sleep(0.01)
    writer.write(1, {"train": {"loss": 1.0}})
    assert len(lines_of(tmp_path)) == 1


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
        "train/loss",
        "train/nelbo",
        "heldout/nelbo",
        "speed/tokens_per_s",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]
    assert [event.value for event in events.Scalars("speed/tokens_per_s")] == [1, 1, 1, 2, 2, 2]
    assert events.Scalars("train/nelbo")[-1].value == pytest.approx(60 * math.pi)
    (text_tag,) = tags["tensors"]
    assert text_tag.startswith("samples/0")
    assert events.Tensors(text_tag)[0].tensor_proto.string_val == [b"*once* upon"]


# ---- on the screen

METRICS = {"loss": 3.41234, "bits_per_byte": 2.909}
SPEED = {"tokens_per_s": 12_345.0, "data_wait_share": 0.0012, "step_s": 0.0969}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_instead_of_a_bar_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(num_steps=2000, stream=stream) as progress:
        for step in range(1, 41):
            progress.advance(step)
        progress.report(40, METRICS, SPEED)
        progress.say("checkpoint saved: step 40")
    assert stream.getvalue() == (
        "step 40/2000 loss 3.412 bits/byte 2.91 tokens/s 12.3k wait 0.1% eta 3m10s\ncheckpoint "
        "saved: step 40\n"
    )


def test_utilisation_is_shown_where_it_is_known():
    assert " mfu 45.5% " in summary_line(METRICS, SPEED | {"mfu": 0.4551}, steps_left=1)


def test_a_terminal_shows_a_bar_with_the_numbers_and_messages_stay_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with Progress(num_steps=2000, start_step=20, stream=stream) as progress:
        progress.advance(30)
        progress.report(40, METRICS, SPEED)
        progress.say("checkpoint [1] saved: " + "x" * 200)
        progress.report(50, METRICS, SPEED)
    text = stream.getvalue()
    assert "checkpoint [1] saved: " + "x" * 200 in text
    assert "50/2000" in text
    assert "12.3k" in text
    assert text.endswith("\n") or text.endswith("\x1b[?25h")  # the cursor is visible again


def test_other_processes_print_nothing():
    for stream in (Terminal(), io.StringIO()):
        with Progress(num_steps=10, enabled=False, stream=stream) as progress:
            progress.advance(1)
            progress.report(1, METRICS, SPEED)
            progress.say("hello")
        assert stream.getvalue() == ""


# ---- numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (0.5, "0.50"),
        (12_345, "12.3k"),
        (999_999, "1.00M"),
        (1_234_567, "1.23M"),
    ]
    + [
        (8_015_581_184, "8.02B"),
        (2.3e12, "2.30T"),
        (4e16, "40000T"),
        (9.996, "10.0"),
        (-1500, "-1.50k"),
    ],
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "1.00 KiB"),
        (4.5 * 2**30, "4.50 GiB"),
        (95 * 2**30, "95.0 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (0.44, "0.4s"), (9.96, "10s"), (59.6, "1m00s"), (190, "3m10s"), (3599.7, "1h00m")]
    + [(7500, "2h05m"), (86399.9, "1d00h"), (961_200, "11d03h")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@given(st.floats(0, 1e15))
def test_counts_are_within_half_of_their_last_digit(number):
    text = format_count(number)
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * factor == pytest.approx(number, rel=0.006, abs=0.006)
