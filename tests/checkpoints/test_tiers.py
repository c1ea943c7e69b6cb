"""Both tiers of checkpoints in processes of their own: agreement, kills, and memory."""

import json
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from support.runs import (
    assert_same_run,
    free_port,
    is_committed,
    kill_when,
    last_logged_step,
    saved_arrays,
)
from support.states import (
    abstract_of,
    assert_same,
    mesh_of,
    start_script,
    state_at,
    steps_in,
)

from llada_jax.checkpoints.host_copies import LocalCheckpoints


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_run_goes_on_from_its_local_copies_or_from_the_workdir_when_they_are_lost(
    runs, tmp_path, is_lost
):
    """Copies every 3 steps on the local disk, checkpoints every 10; killed soon after step 13."""
    words = ["num_steps=24", "schedule.name=cosine", "checkpoint.every_steps=10"]
    straight, workdir, disk = (
        runs.directory / "without-tiers",
        runs.directory / f"tiers-{is_lost}",
        tmp_path / "disk",
    )
    if not straight.exists():
        runs.train(straight, *words)
    tiers = [f"checkpoint.local_directory={disk}", "checkpoint.local_every_steps=3"]
    process = runs.start(workdir, *words, *tiers)
    kill_when(
        process,
        lambda: (
            last_logged_step(workdir) >= 13 and 12 in steps_in(disk) and is_committed(workdir, 10)
        ),
    )
    if is_lost:
        shutil.rmtree(disk)
    log = runs.train(workdir, *words, *tiers)
    start = rf"step 10 of {workdir}" if is_lost else rf"step (12|15|18) of {disk}"
    assert re.search(f"start       {start}", log), log
    assert_same_run(workdir, straight, step=24)


@pytest.mark.slow
def test_a_step_that_only_its_host_or_another_run_has_is_saved_in_the_workdir(runs, tmp_path):
    """Killed after the copy on the local disk and before the save in the workdir was whole: at the
    last step of a run, and at a permanent one. A run that continues another is the same case.
    """
    words = ["num_steps=24", "schedule.name=cosine", "checkpoint.every_steps=6"]
    words += ["checkpoint.keep=1", "checkpoint.keep_every_steps=18"]
    workdir, disk = tmp_path / "run", tmp_path / "disk"
    tiers = [f"checkpoint.local_directory={disk}", "checkpoint.local_every_steps=6"]
    runs.train(workdir, *words, *tiers)
    before = {step: saved_arrays(workdir, step) for step in (18, 24)}
    for step in (24, 18):
        shutil.rmtree(workdir / "checkpoints" / "24")
        if step == 18:
            shutil.rmtree(workdir / "checkpoints" / "18")
            for part in disk.glob("*/24.*"):
                shutil.rmtree(part)
        log = runs.train(workdir, *words, *tiers)
        assert f"start       step {step} of {disk}" in log
        for saved in (18, 24):
            after = saved_arrays(workdir, saved)
            for name, array in before[saved].items():
                np.testing.assert_array_equal(after[name], array, err_msg=name)

    runs.train(tmp_path / "other", *words, f"checkpoint.restore={workdir}@24")
    assert is_committed(tmp_path / "other", 24)


# ---- two processes

# Each process has a disk of its own. What every one of them restores after each accident is
# printed.
TEAM = """
import shutil
from pathlib import Path
from support.records import small_record
from support.states import *
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
me = jax.process_index()
mesh = mesh_of(fsdp=4, tensor=2)
disk = Path(sys.argv[1]) / f"disk-{me}"
abstract = abstract_of(state_at(0, mesh))

def restored():
    state, _, note = LocalCheckpoints(disk, "runs/a").restore(abstract, newer_than=0)
    if state is None:
        return [0, note]
    expected = state_at(int(state.step), mesh)
    are_equal = jax.jit(lambda a, b: (a == b).all())
    same = jax.tree.map(lambda a, b: bool(are_equal(a, b)), state, expected)
    return [int(state.step) if all(jax.tree.leaves(same)) else -1, note]

def part(step):
    return copies.directory / f"{step}.{me}-of-2"

copies = saved_copies(disk, mesh, 10, 20, 30)
told = {"whole": restored()}
if me == 1:
    content = bytearray((part(30) / "data").read_bytes())
    content[5] ^= 1
    (part(30) / "data").write_bytes(content)
told["damaged in 1"] = restored()
if me == 0:
    shutil.rmtree(part(20))
    shutil.rmtree(part(10))
told["and missing in 0"] = restored()
copies = saved_copies(disk, mesh, 40)
again, state = LocalCheckpoints(disk, "runs/a"), state_at(40, mesh)
if me == 0:  # the second attempt was killed when only one process had saved
    again.save(state, small_record())
    again.wait()
told["of two attempts"] = restored()
print(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_both_can_read(tmp_path):
    address = f"localhost:{free_port()}"
    processes = [start_script(TEAM, tmp_path, address, number) for number in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]  # below what gloo says
    assert told[0] == told[1]
    assert told[0]["whole"] == [30, ""]
    step, note = told[0]["damaged in 1"]
    assert step == 20
    assert "not the local copy of step 30: process 1 does not have all" in note
    step, note = told[0]["and missing in 0"]
    assert step == 0
    assert "step 30: process 1" in note
    step, note = told[0]["of two attempts"]
    assert step == 0
    assert "not the local copy of step 40: process" in note


# ---- kills

SAVER = """
from llada_jax.checkpoints import host_copies
from support.records import small_record
from support.states import *
jax.config.update("jax_num_cpu_devices", 8)
mesh = mesh_of(fsdp=4, tensor=2)
crc32 = host_copies.zlib.crc32
host_copies.zlib.crc32 = lambda content: time.sleep(0.005) or crc32(content)  # most of the time
copies = LocalCheckpoints(sys.argv[1], "runs/a")
state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
step = int(state.step) if state else 0
while True:
    step += 1
    copies.save(state_at(step, mesh), small_record())
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_copy(tmp_path):
    mesh = mesh_of(fsdp=4, tensor=2)
    moment, reached, num_torn = random.Random(0), 0, 0
    for _ in range(4):
        process = start_script(SAVER, tmp_path)
        deadline = time.monotonic() + 120
        while max(steps_in(tmp_path), default=0) < reached + 5:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_torn += len(list(tmp_path.glob("*/*.partial")))
        state, _, note = LocalCheckpoints(tmp_path, "runs/a").restore(
            abstract_of(state_at(0, mesh)), newer_than=0
        )
        assert note == ""
        assert int(state.step) >= reached + 5
        assert_same(state, state_at(int(state.step), mesh))
        reached = int(state.step)
    assert num_torn > 0  # some of the kills hit a save


# ---- memory

FIFTY = """
import ctypes, gc
import jax.numpy as jnp
from support.records import small_record
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.run.clock import host_rss_bytes
from llada_jax.training.state import TrainState

zeros = lambda: jnp.zeros((4, 512, 1024))
metrics = {"loss": (jnp.float32(0), jnp.float32(1))}
state = TrainState(jnp.int32(0), {"w": zeros()}, (zeros(), zeros()), {}, metrics)
advance = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1, s), donate_argnums=0)
saved, local = Checkpoints(sys.argv[1] + "/run"), LocalCheckpoints(sys.argv[1] + "/local", "run")

def save(times):
    global state
    for _ in range(times):
        state = advance(state)
        saved.save(state, small_record())
        local.save(state, small_record())
    saved.wait(), local.wait(), gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free in the allocator is not a leak
    return host_rss_bytes()

before = save(20)
print(json.dumps([before, save(50), sum(leaf.nbytes for leaf in jax.tree.leaves(state))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is of glibc")
def test_fifty_saves_in_a_row_do_not_grow_the_resident_memory(tmp_path):
    # compiled as users do: it computes for longer than it compiles
    process = start_script(FIFTY, tmp_path, XLA_FLAGS="")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    before, after, state_bytes = json.loads(out)
    # One forgotten copy per save would be 50 states. Between two measurements lie up to 0.8 of one,
    # up or down: buffers that the last save still had or had not given back.
    assert after - before < 2 * state_bytes, (
        f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after"
    )
