"""The window of steps that JAX's profiler records."""

import jax.numpy as jnp
import pytest

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
