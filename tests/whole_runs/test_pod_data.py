"""From raw text to a run, as on a pod: a corpus that four processes have prepared, each from inputs
of its own, is joined in a bucket that answers late, trains on two hosts, is killed, and resumes.
"""

import shutil
import subprocess
import sys
import time

import pytest
from support.buckets import emulated, environment_of
from support.corpora import write_corpus
from support.runs import assert_same_run, last_logged_step
from support.two_hosts import two_hosts

from llada_jax.__main__ import main
from llada_jax.data.parts import join_parts
from llada_jax.data.records import read_dataset
from llada_jax.storage.remote import upload

NUM_PARTS, NUM_STEPS, LATENCY_S = 4, 20, 0.02
SETTINGS = (
    f"num_steps={NUM_STEPS}",
    "schedule.name=cosine",
    "checkpoint.every_steps=5",
    "evaluation.every_steps=0",
)

hosts = pytest.fixture(scope="module")(two_hosts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of all parts, on a disk."""
    folder = tmp_path_factory.mktemp("pod")
    write_corpus(folder / "raw", num_files=2 * NUM_PARTS, num_documents=60)
    command = [sys.executable, "-m", "llada_jax", "prepare", "--output", str(folder / "set")]
    command += ["--sequence-length", "32", "--tokenizer", "bytes", "--heldout", "0.1"]
    processes = []
    for number in range(NUM_PARTS):
        files = [f"{folder}/raw/part-{i:03d}.jsonl" for i in (2 * number, 2 * number + 1)]
        words = [*command, "--part", f"{number}/{NUM_PARTS}", "--workers", "1", "--input", *files]
        processes.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
    logs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * NUM_PARTS, logs
    return folder / "set"


@pytest.mark.slow
def test_parts_joined_in_a_slow_bucket_train_on_two_hosts_are_killed_and_resume_bitwise(
    hosts, runs, corpus, tmp_path
):
    with emulated("gs", tmp_path / "log", listens_on="0.0.0.0", latency_s=LATENCY_S) as bucket:
        upload(corpus, f"{bucket}/set")
        assert main(["prepare", "--join", f"{bucket}/set"]) == 0
        join_parts(corpus)
        begun = time.monotonic()
        info = read_dataset(f"{bucket}/set")
        # or the bucket would not be a slow one
        assert time.monotonic() - begun >= LATENCY_S
        assert info.fingerprint == read_dataset(corpus).fingerprint
        assert len(info.splits["train"].shards) == NUM_PARTS

        straight, workdir = tmp_path / "straight", tmp_path / "run"
        knobs = (f"data.path={corpus}", *SETTINGS)
        assert hosts.end(hosts.start(runs, straight, *knobs), straight) == [0, 0], hosts.logs(
            straight
        )
        # nothing of it is left on a disk
        shutil.rmtree(corpus)
        knobs = (f"data.path={bucket}/set", *SETTINGS)
        environments = [environment_of("gs", hosts.machine_of(number)) for number in range(2)]
        processes = hosts.start(runs, workdir, *knobs, environments=environments)
        deadline = time.monotonic() + 300
        while last_logged_step(workdir) < NUM_STEPS // 2:
            assert all(process.poll() is None for process in processes), hosts.logs(workdir)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for process in processes:
            process.kill()
        assert hosts.end(processes, workdir) == [-9, -9]
        assert last_logged_step(workdir) < NUM_STEPS
        processes = hosts.start(runs, workdir, *knobs, environments=environments)
        assert hosts.end(processes, workdir) == [0, 0], hosts.logs(workdir)
        assert "start       step" in hosts.logs(workdir)
    assert_same_run(workdir, straight, step=NUM_STEPS)
