"""The tiers of checkpoints: what a local copy gives back, when it is not used, and what fifty saves
leave in memory.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import kills
from support.runs import (
    free_port,
    is_committed,
    kill_when,
    last_logged_step,
    metric_lines,
    saved_arrays,
)

from llada_jax.checkpoints import host_copies
from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.cluster.sharding import make_mesh
from llada_jax.errors import UserError
from llada_jax.training.state import TrainState

SPECS = {"whole": P(), "rows": P("fsdp"), "both": P("fsdp", "tensor"), "half": P(None, "tensor")}


def mesh_of(**sizes):
    return make_mesh(
        sizes,
        devices=jax.devices()[: int(np.prod(list(sizes.values())))],
    )


def state_at(step: int, mesh) -> TrainState:
    """A state that is a function of the step alone: each array in another sharding, one in
    bfloat16, some scalars.
    """
    key = jax.random.fold_in(jax.random.key(0), step)

    def place(array, spec):
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, spec), lambda index: array[index]
        )

    params = {name: place(jax.random.normal(key, (8, 4)), spec) for name, spec in SPECS.items()}
    params["bf16"] = place(jax.random.normal(key, (8, 8), jnp.bfloat16), P("fsdp"))
    scalars = {"loss": (place(jnp.float32(step / 3), P()), place(jnp.float32(step), P()))}
    return TrainState(
        place(jnp.int32(step), P()), params, (place(jnp.int32(step), P()),), {}, scalars
    )


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same(actual: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def mesh():
    return mesh_of(fsdp=4, tensor=2)


def saved_copies(directory, mesh, *steps: int, workdir="runs/a") -> LocalCheckpoints:
    copies = LocalCheckpoints(directory, workdir)
    for step in steps:
        copies.save(state_at(step, mesh), {"seed": step})
    copies.wait()
    return copies


def test_the_newest_copy_comes_back_bit_for_bit_and_may_be_donated(tmp_path, mesh):
    saved_copies(tmp_path, mesh, 10, 20)
    state, run, note = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(state, state_at(20, mesh))
    assert (run, note) == ({"seed": 20}, "")
    doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + leaf, s), donate_argnums=0)(state)
    assert int(doubled.step) == 40
    again, _, _ = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(again, state_at(20, mesh))


def test_a_slice_that_several_devices_hold_is_written_once(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(10, mesh)))
    assert (copies.directory / "10.0-of-1" / "data").stat().st_size == size


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, mesh):
    copies = LocalCheckpoints(tmp_path, "runs/a")
    state = state_at(10, mesh)
    copies.save(state, {})
    jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state)
    copies.close()
    state, _, _ = LocalCheckpoints(tmp_path, "runs/a").restore(
        abstract_of(state_at(0, mesh)), newer_than=0
    )
    assert_same(state, state_at(10, mesh))


def test_two_copies_are_kept_beside_the_one_written_and_later_ones_can_be_given_up(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20, 30, 40)
    assert sorted(path.name for path in copies.directory.iterdir()) == [
        "20.0-of-1",
        "30.0-of-1",
        "40.0-of-1",
    ]
    copies.drop_after(20)
    assert [path.name for path in copies.directory.iterdir()] == ["20.0-of-1"]


def test_runs_with_workdirs_of_the_same_name_do_not_share_copies(tmp_path, mesh):
    saved_copies(tmp_path, mesh, 10, workdir="gs://one/run")
    other = LocalCheckpoints(tmp_path, "gs://two/run")
    assert other.restore(abstract_of(state_at(0, mesh)), newer_than=0) == (None, {}, "")


def test_a_copy_that_is_not_newer_than_the_checkpoint_is_not_used(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    assert copies.restore(abstract_of(state_at(0, mesh)), newer_than=20) == (None, {}, "")


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"tensor": 2}])
def test_another_mesh_cannot_use_the_copies_and_says_so(tmp_path, mesh, sizes):
    copies = saved_copies(tmp_path, mesh, 10)
    state, _, note = copies.restore(abstract_of(state_at(0, mesh_of(**sizes))), newer_than=0)
    assert state is None
    assert (
        "not the local copy of step 10: process 0 has not all of its slices, undamaged and for "
        "this mesh" in note
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_makes_the_older_copy_the_newest(tmp_path, mesh, place, bit):
    shutil.rmtree(tmp_path)
    copies = saved_copies(tmp_path, mesh, 10, 20)
    data = copies.directory / "20.0-of-1" / "data"
    content = bytearray(data.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    data.write_bytes(content)
    state, _, note = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))
    assert "not the local copy of step 20" in note


@pytest.mark.parametrize("file", ["data", "index.json"])
def test_a_truncated_copy_makes_the_older_one_the_newest(tmp_path, mesh, file):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    torn = copies.directory / "20.0-of-1" / file
    os.truncate(torn, torn.stat().st_size // 2)
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))


def test_what_a_killed_save_left_is_not_used_and_removed(tmp_path, mesh):
    copies = saved_copies(tmp_path, mesh, 10, 20)
    (copies.directory / "20.0-of-1").rename(copies.directory / "20.0-of-1.partial")
    copies = LocalCheckpoints(tmp_path, "runs/a")
    state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
    assert_same(state, state_at(10, mesh))
    assert [path.name for path in copies.directory.iterdir()] == ["10.0-of-1"]


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"local_directory"):
        LocalCheckpoints(tmp_path / "file", "runs/a")


def test_a_save_that_failed_is_told_by_the_next_one(tmp_path, mesh, monkeypatch):
    copies = LocalCheckpoints(tmp_path, "runs/a")

    def full(content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_copies.zlib, "crc32", full)
    copies.save(state_at(10, mesh), {})
    with pytest.raises(UserError, match="No space left on device"):
        copies.save(state_at(20, mesh), {})


# ---- a run with tiers


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
    expected, actual = saved_arrays(straight, 24), saved_arrays(workdir, 24)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    assert metric_lines(workdir) == metric_lines(straight)


@pytest.mark.slow
def test_kills_of_two_processes_cost_only_the_steps_since_the_last_save(tmp_path, small_dataset):
    """A few of them, from a fixed seed; `python tests/support/kills.py --kills 20` is the long one."""
    done = kills.run(tmp_path / "kills", small_dataset, num_kills=3, num_steps=24, seed=4)
    assert any(kill["sent"] for kill in done)


# ---- several processes

HEADER = """
import json, sys
from pathlib import Path
sys.path[:0] = {tests!r}
import jax
"""

# Each process has a disk of its own. What every one of them restores after each accident is
# printed.
TEAM = """
from test_workdir import *
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
    same = jax.tree.map(lambda a, b: bool(jax.jit(lambda a, b: (a == b).all())(a, b)), state, expected)
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
    again.save(state, {})
    again.wait()
told["of two attempts"] = restored()
print(json.dumps(told))
"""


def start_team(code: str, disks: Path) -> list[subprocess.Popen]:
    address = f"localhost:{free_port()}"
    script = (
        HEADER.format(tests=[str(path) for path in Path(__file__).resolve().parents[:2]]) + code
    )
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, str(disks), address, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


@pytest.mark.slow
def test_two_processes_agree_on_what_both_can_read(tmp_path):
    processes = start_team(TEAM, tmp_path)
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = [json.loads(out.splitlines()[-1]) for out, _ in outputs]  # below what gloo says
    assert told[0] == told[1]
    assert told[0]["whole"] == [30, ""]
    step, note = told[0]["damaged in 1"]
    assert step == 20
    assert "not the local copy of step 30: process 1 has not all" in note
    step, note = told[0]["and missing in 0"]
    assert step == 0
    assert "step 30: process 1" in note
    step, note = told[0]["of two attempts"]
    assert step == 0
    assert "not the local copy of step 40: process" in note


# ---- processes of its own

SAVER = """
from test_workdir import *
mesh = mesh_of(fsdp=4, tensor=2)
crc32 = local_checkpoint.zlib.crc32
local_checkpoint.zlib.crc32 = lambda content: time.sleep(0.005) or crc32(content)  # saving takes most of the time
copies = LocalCheckpoints(sys.argv[1], "runs/a")
state, _, _ = copies.restore(abstract_of(state_at(0, mesh)), newer_than=0)
step = int(state.step) if state else 0
while True:
    step += 1
    copies.save(state_at(step, mesh), {})
"""


def steps_in(disk: Path) -> list[int]:
    return [
        int(path.name.partition(".")[0]) for path in disk.glob("*/*") if path.suffix != ".partial"
    ]


@pytest.mark.slow
def test_kills_at_random_moments_leave_a_whole_copy(tmp_path, mesh):
    moment, reached, num_torn = random.Random(0), 0, 0
    script = (
        HEADER.format(tests=[str(path) for path in Path(__file__).resolve().parents[:2]]) + SAVER
    )
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
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


FIFTY = """
import ctypes, gc
import jax.numpy as jnp
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.checkpoints.host_copies import LocalCheckpoints
from llada_jax.run.metrics_file import host_rss_bytes
from llada_jax.training.state import TrainState

zeros = lambda: jnp.zeros((4, 512, 1024))
state = TrainState(jnp.int32(0), {"w": zeros()}, (zeros(), zeros()), {}, {"loss": (jnp.float32(0), jnp.float32(1))})
advance = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1, s), donate_argnums=0)
saved, local = Checkpoints(sys.argv[1] + "/run"), LocalCheckpoints(sys.argv[1] + "/local", "run")

def save(times):
    global state
    for _ in range(times):
        state = advance(state)
        saved.save(state, {"config": {}, "architecture": {}, "tokenizer": {}})
        local.save(state, {})
    saved.wait(), local.wait(), gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free in the allocator is no leak
    return host_rss_bytes()

before = save(20)
print(json.dumps([before, save(50), sum(leaf.nbytes for leaf in jax.tree.leaves(state))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is of glibc")
def test_fifty_saves_in_a_row_do_not_grow_the_resident_memory(tmp_path):
    script = (
        HEADER.format(tests=[str(path) for path in Path(__file__).resolve().parents[:2]]) + FIFTY
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after, state_bytes = json.loads(done.stdout)
    # One forgotten copy a save would be 50 states. Between two measurements lie up to 0.8 of one,
    # up or down: buffers that the last save still had or had not given back.
    assert after - before < 2 * state_bytes, (
        f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after"
    )
