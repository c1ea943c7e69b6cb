"""The local launcher: what it starts, how it ends, and that it does not change a run."""

import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time

import local
import numpy as np
import pytest
from support.documents import launcher_commands
from support.paths import LAUNCH
from support.processes import is_gone
from support.runs import losses

LAUNCHER = LAUNCH / "local.py"


def launch(*words, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dry_run_prints_one_line_per_process_and_starts_nothing(tmp_path):
    process = launch(
        "--processes", 3, "--devices", 2, "--dry-run", "--", "touch", tmp_path / "started"
    )
    out, _ = process.communicate(timeout=60)
    lines = out.splitlines()
    assert process.returncode == 0
    assert len(lines) == 3
    assert len({line.split("JAX_COORDINATOR_ADDRESS=")[1].split()[0] for line in lines}) == 1
    for number, line in enumerate(lines):
        assert f"JAX_PROCESS_ID={number} " in line
        assert "JAX_NUM_PROCESSES=3" in line
        assert "JAX_NUM_CPU_DEVICES=2" in line
        assert line.endswith(f"touch {tmp_path / 'started'}")
    assert not (tmp_path / "started").exists()


def test_every_command_of_the_documents_is_accepted(capsys):
    commands = launcher_commands("local")
    assert len(commands) >= 2
    for flags, command in commands:
        assert local.main([*flags, "--dry-run", "--", *command]) == 0
        assert shlex.join(command) in capsys.readouterr().out


def test_one_failure_ends_all_processes_with_its_status(tmp_path):
    code = (
        "import os, sys, time\n"
        "time.sleep(600) if os.environ['JAX_PROCESS_ID'] != '1' else sys.exit(3)"
    )
    process = launch(
        "--processes", 3, "--logs", tmp_path, "--grace", 1, "--", sys.executable, "-c", code
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "ended with status 3" in err


class Ended:
    def __init__(self, code):
        self.poll = lambda: code


@pytest.mark.parametrize(
    ("codes", "status"),
    [((0, 0), 0), ((42, 3), 3), ((-9, 42), 137), ((42, 42), 42), ((0, -15), 143), ((1, 2), 1)],
)
def test_among_simultaneous_failures_one_that_a_restart_cannot_fix_decides_the_status(
    codes, status
):
    launcher = runpy.run_path(str(LAUNCHER))
    assert launcher["wait"]([Ended(code) for code in codes], grace_seconds=60) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_process(tmp_path, number):
    code = (
        "import os, signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'up-' + os.environ['JAX_PROCESS_ID']).touch()\n"
        "time.sleep(600)"
    )
    process = launch("--processes", 2, "--logs", tmp_path, "--", sys.executable, "-c", code)
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 42


def test_a_second_sigterm_kills_no_process_that_is_saving(tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        f"place, asked = pathlib.Path({str(tmp_path)!r}), []\n"
        "def save(*_):\n"
        "    asked.append(1)\n"
        "    (place / f'asked-{len(asked)}').touch()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(place / 'up').touch()\n"
        "while len(asked) < 2: time.sleep(0.05)\n"
        "sys.exit(42)"
    )
    process = launch("--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code)
    for sign in ("up", "asked-1"):
        wait_until((tmp_path / sign).exists)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 42


def test_nohup_lets_a_run_outlive_its_terminal(tmp_path):
    code = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'up').touch(); time.sleep(2)"
    ignores = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    words = ["--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code]
    process = launch(*words, preexec_fn=ignores)
    wait_until((tmp_path / "up").exists)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_process_is_killed_with_what_it_has_started_and_what_is_left_is_not_waited_for(tmp_path):
    """What the first process leaves behind holds its output open."""
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "number = os.environ['JAX_PROCESS_ID']\n"
        "left = subprocess.Popen(['sleep', '600'])\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "(place / f'{number}.part').write_text(str(left.pid))\n"
        "(place / f'{number}.part').rename(place / f'{number}.pid')\n"
        "while number == '1' or not (place / '1.pid').exists(): time.sleep(0.05)\n"
        "sys.exit(3)"
    )
    words = ["--grace", 0, "--logs", tmp_path, "--", sys.executable, "-c", code]
    process = launch("--processes", 2, *words)
    process.communicate(timeout=60)
    assert process.returncode == 3
    left, killed = (int((tmp_path / f"{number}.pid").read_text()) for number in range(2))
    os.kill(left, signal.SIGKILL)
    wait_until(lambda: is_gone(killed))


def test_a_second_ctrl_c_kills_the_processes(tmp_path):
    code = (
        "import os, signal, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'up-' + os.environ['JAX_PROCESS_ID']).touch()\n"
        "while True: time.sleep(1)"
    )
    process = launch("--processes", 2, "--logs", tmp_path, "--", sys.executable, "-c", code)
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: all("asked" in log.read_text() for log in tmp_path.glob("process-*.log")))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


def test_every_process_has_a_log_and_the_first_is_shown(tmp_path):
    code = (
        "import os, sys\n"
        "print('I am', os.environ['JAX_PROCESS_ID'], os.environ.get('JAX_LOCAL_DEVICE_IDS'))\n"
        "sys.stdout.flush(); print('progress', file=sys.stderr)"
    )
    # The second start appends to the logs of the first.
    for _ in range(2):
        words = ["--logs", tmp_path, "--", sys.executable, "-c", code]
        # of a process that is one of several itself
        env = {**os.environ, "JAX_PROCESS_ID": "7", "JAX_LOCAL_DEVICE_IDS": "7"}
        process = launch("--processes", 2, *words, env=env)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert (out, err) == ("I am 0 0\n", "progress\n")
    for number in range(2):
        lines = (tmp_path / f"process-{number}.log").read_text().splitlines()
        assert sorted(lines) == [f"I am {number} {number}"] * 2 + ["progress"] * 2


def test_a_large_output_arrives_completely(tmp_path):
    code = "import sys; sys.stdout.write('x' * 3_000_000); sys.stdout.flush(); sys.exit(3)"
    process = launch("--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert len(out) == (tmp_path / "process-0.log").stat().st_size == 3_000_000


def test_a_closed_terminal_does_not_stop_the_run(tmp_path):
    code = (
        "import time\nfor i in range(50): print('x' * 9999, flush=True)\nprint('end', flush=True)"
    )
    process = launch("--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code)
    process.stdout.close()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()
    assert (tmp_path / "process-0.log").read_text().endswith("end\n")


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_launcher_without_standard_streams_runs_all_the_same(tmp_path, missing):
    """As cron jobs and daemons are started by some: `... <&- >&- 2>&-`."""
    code = "print('out', flush=True)"
    process = launch(
        *("--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code),
        preexec_fn=lambda: [os.close(number) for number in missing],
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "process-0.log").read_text() == "out\n"


def test_a_full_disk_under_the_logs_does_not_stop_the_run(tmp_path):
    code = "for _ in range(50): print('x' * 9999, flush=True)"
    (tmp_path / "process-0.log").symlink_to("/dev/full")
    process = launch("--processes", 1, "--logs", tmp_path, "--", sys.executable, "-c", code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert len(out) == 500_000


def test_a_missing_command_is_reported():
    process = launch("--processes", 2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "there is no command" in err


def test_a_program_that_does_not_exist_is_reported(tmp_path):
    process = launch("--processes", 2, "--logs", tmp_path, "--", "no-such-program")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no program 'no-such-program'" in err


@pytest.mark.slow
def test_a_run_under_the_launcher_has_the_loss_curve_of_one_process(runs, tmp_path):
    alone, together = runs.directory / "launched-alone", runs.directory / "launched"
    runs.train(alone, "num_steps=6")
    words = [f"--config.{knob}" for knob in ("num_steps=6", f"data.path={runs.dataset}")]
    process = launch(
        "--processes",
        2,
        "--devices",
        2,
        "--logs",
        tmp_path,
        "--",
        sys.executable,
        "-m",
        "llada_jax",
        "train",
        "--config",
        runs.directory / "small.py",
        "--workdir",
        together,
        *words,
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "2 process" in err
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can tie processes")
def test_a_launcher_that_is_killed_leaves_no_process_behind(tmp_path):
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / os.environ['JAX_PROCESS_ID']\n"
        "def end(*_):\n"
        "    place.with_suffix('.saved').write_text('')\n"
        "    sys.exit(42)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "place.with_suffix('.started').write_text('')\n"
        "time.sleep(600)\n"
    )
    process = launch("--processes", 2, "--logs", tmp_path, "--", sys.executable, "-c", code)
    wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2)
    process.kill()
    # Each process was asked to stop, so that a run can save.
    wait_until(lambda: len(list(tmp_path.glob("*.saved"))) == 2)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--logs", "a" * 300], "write a shorter one"),
        (["--logs=~no-such-user/x"], "names the home directory of a user"),
        (["--logs", f"{LAUNCHER}/x"], "launch.py/x cannot be written (Not a directory)"),
        (["--grace", "nan"], "--grace nan must be at least 0"),
        (["--processes", "0"], "--processes 0 must be at least 1"),
        (["--devices", "0"], "--devices 0 must be at least 1"),
    ],
)
def test_mistakes_are_reported(words, sentence):
    process = launch("--processes", 1, *words, "--", "true")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert sentence.replace("launch.py", str(LAUNCHER)) in err


def test_the_coordinator_listens_where_no_other_machine_can_connect():
    process = launch("--processes", 2, "--dry-run", "--", "true")
    out, _ = process.communicate(timeout=60)
    assert all("JAX_COORDINATOR_ADDRESS=127.0.0.1:" in line for line in out.splitlines())


def test_two_runs_on_one_machine_meet_at_ports_of_their_own():
    with socket.socket() as other:
        other.bind(("localhost", local.free_port()))
        other.listen()
        assert local.free_port() != other.getsockname()[1]
