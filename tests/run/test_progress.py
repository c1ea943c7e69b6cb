"""The display: a bar on a terminal, lines elsewhere, and the numbers in it."""

import io
import threading
import types

import llada_jax.progress
from llada_jax.progress import Display, reported_every
from llada_jax.run.progress import Progress, summary_line

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


def test_a_display_shows_the_words_on_both_sides_of_its_bar_and_no_bar_in_a_log():
    for stream in (Terminal(), io.StringIO()):
        with Display(total=50, stream=stream) as display:
            assert display.has_bar == stream.isatty()
            display.update(10, before="20% [red]", after="5.0 MB/s [red] eta 8s")
            display.say("a [red] line")
        text = stream.getvalue()
        assert "a [red] line\n" in text
        assert ("20% [red]" in text and "5.0 MB/s [red] eta 8s" in text) == stream.isatty()


def test_a_bar_begins_where_the_work_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    def last_frame(*moves: int, completed: int) -> str:
        stream = Terminal()
        with Display(total=50, completed=completed, stream=stream) as display:
            for move in moves:
                display.update(move)
        return stream.getvalue().rpartition("\r")[2]

    assert last_frame(completed=25) == last_frame(25, completed=0) != last_frame(completed=0)


def test_a_result_that_goes_to_a_pipe_does_not_land_in_the_bar(monkeypatch):
    pipe, stream = io.StringIO(), Terminal()
    monkeypatch.setattr("sys.stdout", pipe)
    with Display(total=50, stream=stream):
        print("the result")
    assert pipe.getvalue() == "the result\n"
    assert "the result" not in stream.getvalue()


def test_a_silent_block_is_reported_every_so_often_until_it_ends(monkeypatch):
    moments, periods, said, has_said = iter([100.0, 103.0, 106.5]), [], [], threading.Event()

    class Ended(threading.Event):
        def wait(self, timeout=None):
            periods.append(timeout)
            # two periods pass at once, and the third never does
            return super().wait(0 if len(periods) <= 2 else None)

    def report(seconds: float) -> None:
        said.append((seconds, threading.current_thread()))
        if len(said) == 2:
            has_said.set()

    # the threads of Python itself wait for events, which stay as they are
    threads = types.SimpleNamespace(Thread=threading.Thread, Event=Ended)
    monkeypatch.setattr(llada_jax.progress, "threading", threads)
    clock = types.SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr(llada_jax.progress, "time", clock)
    with reported_every(20.0, report):
        assert has_said.wait(60)
    assert periods == [20.0] * 3
    assert [seconds for seconds, _ in said] == [3.0, 6.5]
    assert not any(thread.is_alive() for _, thread in said)


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
