"""The end of a process in which nothing happens for too long."""

import pytest
from support.processes import run_python


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_the_stacks_of_all_threads():
    done = run_python(
        """
        import time
        from llada_jax.cluster.watchdog import Watchdog

        def a_collective_that_never_returns():
            time.sleep(600)

        with Watchdog(timeout_s=4.0) as watchdog:
            for step in range(45):
                time.sleep(0.1)
                watchdog.beat(f"step {step}")
            a_collective_that_never_returns()
        """
    )
    assert done.returncode == 42
    assert "a_collective_that_never_returns" in done.stderr
    assert "Nothing has happened for" in done.stderr
    assert "since step 44" in done.stderr


@pytest.mark.slow
def test_a_watchdog_leaves_alone_what_beats_and_what_it_does_not_watch():
    done = run_python(
        """
        import time
        from llada_jax.cluster.watchdog import Watchdog

        with Watchdog(timeout_s=4.0) as watchdog:
            for step in range(45):
                time.sleep(0.1)
                watchdog.beat(f"step {step}")
        with Watchdog(timeout_s=0):
            time.sleep(0.5)
        time.sleep(4.5)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_process_that_was_suspended_for_longer_than_the_limit_does_not_hang():
    done = run_python(
        """
        import os, signal, subprocess, sys, time
        from llada_jax.cluster.watchdog import Watchdog

        # continues this process, which stops itself meanwhile
        wake = f"import os, signal, time; time.sleep(6); os.kill({os.getpid()}, signal.SIGCONT)"
        with Watchdog(timeout_s=4.0):
            subprocess.Popen([sys.executable, "-c", wake])
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(2.5)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
