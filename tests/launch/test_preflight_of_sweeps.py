"""All runs of a sweep are checked before the first of them is submitted."""

import json
import os

import pytest
import slurm
from preflight import Place, check

from llada_jax.cluster.hardware import machines_named
from llada_jax.errors import UserError

# of the last run alone: it asks for five devices, and there are four
BAD_LAST = "for size in (-1, 4, 5): add({'mesh.fsdp': size})"
GOOD = "for size in (1, 2, 4): add({'mesh.fsdp': size, 'mesh.data': -1})"
MESSAGE = "needs 5 devices, and there are 4"


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """Returns submitted() -> how often sbatch or kubectl was called."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"
    for name in ("kubectl", "sbatch"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\ncat > /dev/null\necho "$0" >> {calls}\necho 1\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)  # the script of a job is written here
    return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("target", "num_calls"), [("gke", 3), ("slurm", 1)])
def test_a_sweep_with_one_run_that_cannot_run_is_not_begun(
    target, num_calls, tmp_path, write_config, call_sweep, submitted
):
    flags = {
        # the directory of the test stands for a bucket
        "gke": ["--image", "i:1", "--topology", "v5p-8", "--gcs-fuse", f"bucket:{tmp_path}"],
        "slurm": ["--gpus-per-node", "4", "--container-image", "i"],
    }[target]
    words = [f"--config.data.path={tmp_path}/corpus", "--run", target, "--", *flags]
    write_config(BAD_LAST)
    _, error = call_sweep(*words, status=2)
    assert MESSAGE in error
    assert len(error.splitlines()) == 1
    assert submitted() == 0
    assert not (tmp_path / "runs").exists()
    # What is corrected is not refused as another sweep.
    write_config(GOOD)
    call_sweep(*words)
    assert submitted() == num_calls
    assert len(json.loads((tmp_path / "runs" / "sweep.json").read_text())["runs"]) == 3


def array_of(indices: str, config: str, *, index=("--index", slurm.INDEX)) -> list[str]:
    command = ["llada-jax", "sweep", "--config", config, "--workdir", "/shared/s", *index]
    flags = ["--gpus-per-node", "4", "--container-image", "i", "--array", indices, "--dry-run"]
    return [*flags, "--", *command, "--config.data.path=/shared/corpus"]


@pytest.mark.parametrize("index", [("--index", slurm.INDEX), (f"--index={slurm.INDEX}",)])
def test_every_index_of_an_array_is_checked(index, write_config, capsys):
    config = write_config(BAD_LAST)
    assert slurm.main(array_of("0-1%1", config, index=index)) == 0
    for indices, message in (
        ("0-2%1", MESSAGE),
        ("0,2", MESSAGE),
        ("0-3:3", "--index 3 is not a run"),
        ("1,0-7", "--index 3 is not a run"),
    ):
        capsys.readouterr()
        assert slurm.main(array_of(indices, config, index=index)) == 2
        out, error = capsys.readouterr()
        assert message in error
        assert not out


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("7", [7]),
        ("0-3", [0, 1, 2, 3]),
        ("0-11%4", list(range(12))),
        ("0,3,5-7%2", [0, 3, 5, 6, 7]),
        ("0-10:5", [0, 5, 10]),
    ],
)
def test_the_indices_of_an_array_are_those_that_slurm_counts(text, indices):
    assert list(slurm.indices_of(text)) == indices


@pytest.mark.parametrize("text", ["", "a", "3-", "0-4:0", "5-3", "1,,2", "-3"])
def test_an_array_that_names_no_indices_is_refused(text):
    with pytest.raises(UserError, match="must list numbers and ranges"):
        slurm.indices_of(text)


def test_the_command_of_a_whole_sweep_is_checked_with_all_of_its_runs(write_config):
    place = Place(machines=machines_named("v5p-8"), extras=("gs",))
    words = ["llada-jax", "sweep", "--config", write_config(BAD_LAST), "--workdir", "gs://b/s"]
    words += ["--config.data.path=gs://b/corpus"]
    assert "can run there" in check([*words, "--index", "1"], place)
    assert "can run there" in check([*words, "--index", "0"], place, indices=[0, 1])
    for command, indices in (([*words, "--run", "local"], ()), ([*words, "--index", "0"], [0, 2])):
        with pytest.raises(UserError, match=MESSAGE):
            check(command, place, indices=indices)
