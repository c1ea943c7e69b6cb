"""The window of steps that JAX's profiler records."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llada_jax.run import profiler
from llada_jax.run.profiler import ProfilerWindow


def failing_run(workdir: str) -> None:
    with ProfilerWindow(workdir, first_step=2, num_steps=3, last_step=9) as window:
        window.before(2)
        window.after(2, jnp.ones(3) + 1, is_stopping=False)
        raise ArithmeticError


def test_a_run_that_fails_in_the_window_leaves_its_profile_and_room_for_another(tmp_path):
    for name in ("first", "second"):
        with pytest.raises(ArithmeticError):
            failing_run(str(tmp_path / name))
        assert list((tmp_path / name / "profile").rglob("*.pb"))


@pytest.fixture
def traces(monkeypatch) -> list[Path]:
    """The folders to which JAX's profiler, of which a stand-in writes one file, records."""
    folders: list[Path] = []

    def start_trace(folder, profiler_options):
        folders.append(Path(folder))

    def stop_trace():
        (folders[-1] / "plugins").mkdir(parents=True)
        (folders[-1] / "plugins" / "host.pb").write_text("recorded")

    monkeypatch.setattr(jax.profiler, "start_trace", start_trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_trace)
    return folders


@pytest.mark.parametrize(
    ("settings", "stops_at", "expected"),
    [
        ({"first_step": 3, "num_steps": 2}, 0, [3, 4]),
        ({"first_step": 3, "num_steps": 99}, 0, [3, 4, 5, 6]),
        ({"first_step": 3, "num_steps": 3}, 4, [3, 4]),
        ({"first_step": 0, "num_steps": 3}, 0, []),
    ],
)
def test_the_window_is_as_long_as_asked_and_ends_with_the_run(
    settings, stops_at, expected, tmp_path, traces
):
    recorded = []
    with ProfilerWindow(str(tmp_path), last_step=6, **settings) as window:
        for step in range(1, 7):
            window.before(step)
            recorded += [step] if traces and not list(tmp_path.rglob("*.pb")) else []
            window.after(step, jnp.ones(3), is_stopping=step == stops_at)
    assert recorded == expected
    assert len(list(tmp_path.rglob("*.pb"))) == bool(expected)


def test_a_profile_of_a_run_in_a_bucket_goes_there_and_leaves_the_disk(
    tmp_path, monkeypatch, traces
):
    # a local path stands in for the bucket, in which folders need not be made
    monkeypatch.setattr(profiler.remote, "is_remote", lambda path: True)
    (tmp_path / "profile" / "plugins").mkdir(parents=True)
    with ProfilerWindow(str(tmp_path), first_step=1, num_steps=1, last_step=6) as window:
        window.before(1)
        window.after(1, jnp.ones(3), is_stopping=False)
    assert (tmp_path / "profile" / "plugins" / "host.pb").read_text() == "recorded"
    assert not traces[0].exists()
