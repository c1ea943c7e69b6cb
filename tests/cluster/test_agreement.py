"""Processes that were started differently refuse to train together, and name what differs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support.runs import SMALL_RUN, free_port

from llada_jax.__main__ import main
from llada_jax.cluster import agreement
from llada_jax.data.codecs import Bytes
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.run.start import RunData


def test_what_differs_is_named_with_its_values_and_processes():
    by_process = {
        2: {"config.seed": ["1", "0"]},
        1: {"config.seed": ["1", "0"], "the version of jax": ["0.10.3", "0.10.2"]},
    }
    assert agreement.differences(by_process) == (
        "config.seed is 0 on process 0 and 1 on processes 1, 2; "
        "the version of jax is 0.10.2 on process 0 and 0.10.3 on process 1"
    )


def test_of_many_differences_and_processes_some_are_named():
    named = agreement.differences({p: {"the records": ["b", "a"]} for p in range(1, 9)})
    assert named == "the records is a on process 0 and b on processes 1, 2, 3, 4, 5 and 3 more"
    named = agreement.differences({1: {f"config.knob{i}": ["1", "0"] for i in range(9)}})
    assert named.count("on process 0") == 6
    assert named.endswith("; and 3 more")


def test_long_values_are_shortened_and_still_differ():
    one, other = (agreement._short(f"{'a' * 100}{end}") for end in "bc")
    assert one != other
    assert len(one) < 70


def test_the_code_and_the_libraries_are_among_the_facts(monkeypatch):
    facts = agreement.program_facts()
    assert {"the version of jax", "the version of jaxlib", "the code of llada_jax"} <= facts.keys()
    changed = Path(agreement.__file__)
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b"")
    )
    agreement._code_digest.cache_clear()
    assert agreement.program_facts()["the code of llada_jax"] != facts["the code of llada_jax"]
    agreement._code_digest.cache_clear()


def test_settings_of_jax_and_flags_of_its_compilers_are_among_the_facts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=2 --xla_dump_to=/disk/of/host0")
    facts = agreement.program_facts()
    assert facts["XLA_FLAGS"] == "--xla_a=2 --xla_b=1"
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        others = agreement.program_facts()
    assert {name for name in facts if facts[name] != others[name]} == {"JAX_THREEFRY_PARTITIONABLE"}
    # every name is one of the installed JAX
    assert "absent" not in facts.values()


def test_the_tokenizer_is_a_fact_next_to_the_records():
    """Equal records may have been made with special ids that differ."""

    def facts(end: int) -> dict[str, str]:
        return RunData((), (), Tokenizer(Bytes(), {"mask": 256, "eos": end})).facts()

    assert facts(257) == facts(257)
    assert facts(257)["the tokenizer"] != facts(258)["the tokenizer"]


def hosts(
    tmp_path: Path,
    *,
    python_path: tuple[str, str] = ("", ""),
    words=((), ()),
    environments: tuple[dict, dict] = ({}, {}),
) -> list[str]:
    """Trains data/ into run/ with one process in each of the folders host0 and host1, which stand
    for the disks of two hosts; returns what they say. Both must end with status 2.
    """
    team = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    (tmp_path / "small.py").write_text(SMALL_RUN)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llada_jax", "train", "--config", "../small.py"]
            + ["--workdir", "run", "--config.data.path=data", *words[number]],
            cwd=tmp_path / f"host{number}",
            env={
                **os.environ,
                **team,
                **environments[number],
                "JAX_NUM_CPU_DEVICES": "2",
                "JAX_PROCESS_ID": str(number),
                "PYTHONPATH": os.pathsep.join(
                    [python_path[number], str(Path(__file__).parents[2])]
                ),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    logs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], logs
    return logs


@pytest.mark.slow
def test_hosts_with_other_records_versions_or_knobs_are_refused_by_name(tmp_path):
    for number in range(2):
        host = tmp_path / f"host{number}"
        host.mkdir()
        (host / "text.txt").write_text(f"line {number} of a text\n" * 100)
        words = ["--input", str(host / "text.txt"), "--output", str(host / "data")]
        main(["prepare", *words, "--tokenizer", "bytes", "--sequence-length", "32"])
    # what `pip install optax==9.9` would leave on the second host
    (tmp_path / "optax-9.9.dist-info").mkdir()
    (tmp_path / "optax-9.9.dist-info" / "METADATA").write_text("Name: optax\nVersion: 9.9\n")
    logs = hosts(
        tmp_path,
        python_path=("", str(tmp_path)),
        words=((), ("--config.optimizer.b2=0.9",)),
        environments=({}, {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}),
    )
    for log in logs:
        sentence = log.splitlines()[-1]
        assert "The processes of this run differ: " in sentence
        assert "config.optimizer.b2 is 0.95 on process 0 and 0.9 on process 1" in sentence
        assert "the version of optax is" in sentence
        assert "and 9.9 on process 1" in sentence
        assert "JAX_DEFAULT_MATMUL_PRECISION is None on process 0 and highest on" in sentence
        assert "the records in data is" in sentence
        assert "tokenizer" not in sentence  # that is the same
        assert not any((tmp_path / f"host{number}" / "run").exists() for number in range(2))


@pytest.mark.slow
def test_a_workdir_that_the_hosts_do_not_share_is_refused(tmp_path, runs):
    """Each process would restore another step, and leave out other batches."""
    workdirs = [tmp_path / f"host{number}" / "run" for number in range(2)]
    for workdir in workdirs:
        workdir.parent.mkdir()
        (workdir.parent / "data").symlink_to(runs.dataset)
    runs.train(workdirs[0], "num_steps=2", "evaluation.every_steps=0")
    for log in hosts(tmp_path):
        sentence = log.splitlines()[-1]
        assert "the newest checkpoint in the workdir is step 2 (" in sentence
        assert "on process 0 and none on process 1" in sentence
    # with the same checkpoint, but other batches left out
    shutil.rmtree(workdirs[1])
    shutil.copytree(workdirs[0], workdirs[1])
    (workdirs[1] / "rollbacks.json").write_text('{"count": 1, "skipped": [[3, 5]]}')
    for log in hosts(tmp_path):
        assert "rollbacks.json is" in log.splitlines()[-1]
        assert "the newest checkpoint" not in log.splitlines()[-1]
    # with nothing saved yet, where the first save would never end
    for workdir in workdirs:
        shutil.rmtree(workdir)
    for log in hosts(tmp_path):
        sentence = log.splitlines()[-1]
        assert "the workdir is one folder on process 0 and another on process 1" in sentence
    assert not workdirs[0].exists()


# The last barrier of the agreement keeps the second process for long enough to lose the first.
LATE = """
import sys, time
from jax._src.distributed import global_state
from llada_jax.__main__ import leave_the_others
from llada_jax.cluster import agreement, distributed
from llada_jax.errors import UserError

class Late:
    def __init__(self, client):
        self.client = client
    def __getattr__(self, name):
        return getattr(self.client, name)
    def wait_at_barrier(self, name, timeout_ms):
        self.client.wait_at_barrier(name, timeout_ms)
        if name.endswith("/read") and global_state.process_id == 1:
            time.sleep(60)

distributed.initialize()
global_state.client = Late(global_state.client)
try:
    agreement.check_same_everywhere({"the colour": f"colour {global_state.process_id}"})
except UserError as error:
    print(f"llada-jax: {error}", file=sys.stderr)
    leave_the_others(error.exit_status)
"""


@pytest.mark.slow
def test_a_process_that_loses_the_first_while_both_are_refused_says_why_too():
    team = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LATE],
            env={**os.environ, **team, "JAX_PROCESS_ID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], logs
    for log in logs:
        assert "the colour is colour 0 on process 0 and colour 1 on process 1" in log
