"""What the launchers find out about a command before anything is rented for it."""

import dataclasses
import re

import gke
import pytest
import slurm
import tpu_vm
from preflight import Place, check, config_of, with_config, words_of
from support.paths import ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.errors import UserError

PLACE = Place(
    machines=machines_named("v5p-128"),
    mounts={"/data": False, "/runs": True},
    extras=("gs", "hf"),
    how_to_install="install {extra}",
)
TRAIN = ["llada-jax", "train", "--config", "configs/llada_8b.py"]
GOOD = [*TRAIN, "--workdir", "gs://b/run", "--config.data.path=/data/corpus"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_command_that_can_run_is_answered_with_its_mesh_and_its_memory():
    found = check(GOOD, PLACE)
    assert re.fullmatch(
        r"llada-jax train can run there: mesh fsdp 64 on 1 x v5p-128, 55\.8 GiB of 95\.7 GiB per "
        r"device \(estimate\)",
        found,
    )


def test_a_run_that_is_estimated_not_to_fit_is_said_to_be_so_and_not_refused():
    found = check(GOOD, Place(machines=machines_named("v5p-16"), mounts=PLACE.mounts))
    assert "estimated not to fit: ask `llada-jax plan`" in found


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["llada-jax", "trian"], "Did you mean 'train'?"),
        ([*GOOD, "--wordkir", "x"], "Did you mean '--workdir'?"),
        (TRAIN, "--workdir"),
        ([*GOOD, "--config.num_stepz=3"], "Did you mean 'num_steps'?"),
        ([*GOOD, "--config.mesh.tensor=5"], "divide the devices"),
        ([*GOOD, "--config.data.batch_size=100"], "cannot be split 64 ways"),
        ([*TRAIN, "--workdir", "gs://b/run"], "pass --config.data.path=DIR"),
        ([*GOOD, "--config.data.path=s3://b/corpus"], "needs the extra 's3'"),
        ([*GOOD, "--config.data.path=az://b/corpus"], "kind of URL"),
        ([*GOOD, "--config.log.tracker=wandb"], "needs the extra 'wandb'"),
        ([*GOOD, "--config.log.compilation_cache=s3://b/programs"], "needs the extra 's3'"),
        ([*GOOD, "--config.log.compilation_cache=az://b/programs"], "kind of URL"),
        ([*GOOD, "--config.data.path=/database"], "config.data.path=/database is not on a disk"),
        ([*GOOD, "--config.data.path=/data/a=1,x/b=2"], "config.data.path=x/b is not on a disk"),
        ([*GOOD, "--config.checkpoint.init_from=w"], "config.checkpoint.init_from=w is not on"),
        ([*GOOD, "--workdir", "runs/8b"], "--workdir runs/8b is not on a disk"),
        ([*GOOD, "--workdir", "/data/run"], "leave out the :ro"),
        ([*GOOD, "--workdir", "s3://b/run"], "needs the extra 's3'"),
        ([*GOOD, "--workdir", "s3://b/run"], "install s3."),
        ([*GOOD, "--workdir", "az://b/run"], "kind of URL"),
        ([*GOOD, "--workdir", "/runs/a*"], "contains '*'"),
        ([*GOOD, "--workdir", ""], "--workdir is empty"),
        (
            [*GOOD, "--config.samples.every_steps=10", "--config.samples.gen_length=10"]
            + ["--config.samples.block_length=4"],
            "block_length=4 must divide gen_length=10",
        ),
        ([*TRAIN[:2], "--config", "absent.py", "--workdir", "gs://b/r"], "There is no config file"),
        (
            ["llada-jax", "sample", "--checkpoint", "run@10", "--gen-length", "8"],
            "--checkpoint run is not on a disk",
        ),
        (
            ["llada-jax", "evaluate", "--checkpoint", "/runs/a", "--data", "s3://b/corpus"],
            "--data s3://b/corpus needs the extra 's3'",
        ),
        (
            ["llada-jax", "evaluate", "--checkpoint", "/runs/a", "--tasks", "gsm8k"],
            "llada-jax evaluate needs the extra 'eval'",
        ),
        (["llada-jax", "evaluate", "--checkpoint", "/runs/a"], "evaluate takes --data DIR"),
        (
            ["llada-jax", "sample", "--checkpoint", "/runs/a", "--temperature", "0"]
            + ["--best-of", "2"],
            "--best-of 2 at --temperature 0",
        ),
        (
            ["llada-jax", "export", "--checkpoint", "/runs/a", "--output", "/runs/b", "--verify"],
            "llada-jax export needs the extra 'torch'",
        ),
        (
            ["llada-jax", "sweep", "--config", "configs/ladder_tiny.py", "--workdir", "gs://b/s"],
            "got nothing to do",
        ),
        (
            ["llada-jax", "sweep", "--config", "configs/ladder_tiny.py", "--workdir", "gs://b/s"]
            + ["--index", "99", "--config.data.path=/data/c"],
            "--index 99 is not a run of configs/ladder_tiny.py",
        ),
    ],
)
def test_a_command_that_cannot_run_is_refused_in_one_sentence_with_the_remedy(command, message):
    with pytest.raises(UserError) as refused:
        check(command, PLACE)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_tracker_that_the_hosts_have_is_accepted():
    place = dataclasses.replace(PLACE, extras=(*PLACE.extras, "trackio"))
    assert "can run there" in check([*GOOD, "--config.log.tracker=trackio"], place)


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ("mesh.tensor=5", "divide the devices"),
        ("mesh.fsdp=64", "needs 64 devices, and there are 128"),
        ("data.batch_size=100", "cannot be split 128 ways"),
        ("optimizer.gradient_accumulation=20", "gradient_accumulation=64 cannot be split 128 ways"),
        ("model.d_ff=12_290", "config.model.d_ff=12290 cannot be split 4 ways"),
        ("model.vocab_size=126_466", "config.model.vocab_size=126466 cannot be split 4 ways"),
        ("schedule.name=absent:rate", "The schedule 'absent:rate' cannot be imported"),
    ],
)
def test_devices_of_an_unknown_kind_must_split_batch_and_network(knob, message):
    # as on SLURM
    place = Place(has_own_disks=True, num_devices=128)
    command = [*TRAIN, "--workdir", "/runs/a", "--config.data.path=/data/corpus"]
    command += ["--config.mesh.tensor=4"] if "4 ways" in message else []
    assert "can run there" in check(command, place)
    with pytest.raises(UserError, match=re.escape(message)):
        check([*command, f"--config.{knob}"], place)


@pytest.mark.parametrize("place", [PLACE, Place(has_own_disks=True)], ids=["v5p-128", "unknown"])
def test_an_objective_must_fit_batches_and_samples_on_any_machines(place):
    command = [*GOOD[:-1], "--config.data.path=/data/corpus", "--workdir", "/runs/a"]
    pairs = ["--config.objective.complementary=True", "--config.objective.weight=none"]
    with pytest.raises(UserError, match="batch_size=1281 must be a multiple of 2"):
        check([*command, *pairs, "--config.data.batch_size=1281"], place)
    sampled = ["--config.objective.name=autoregressive", "--config.samples.every_steps=9"]
    with pytest.raises(UserError, match="sees only what is to its left"):
        check([*command, *sampled], place)


def test_slices_are_joined_along_data():
    two = Place(machines=PLACE.machines, num_slices=2, mounts=PLACE.mounts)
    with pytest.raises(UserError, match=r"set --config\.mesh\.data=2"):
        check(GOOD, two)
    assert "data 2 x fsdp 64 on 2 x v5p-128" in check([*GOOD, "--config.mesh.data=2"], two)


def test_disks_that_the_launcher_does_not_know_are_believed_in():
    place = Place(machines=PLACE.machines, has_own_disks=True)
    check([*GOOD, "--workdir", "/nfs/run", "--config.data.path=/nfs/corpus"], place)
    with pytest.raises(UserError, match="--workdir run is relative"):
        check([*GOOD, "--workdir", "run"], place)


def test_of_two_mounts_the_inner_one_decides_whether_it_can_be_written_to():
    place = Place(machines=PLACE.machines, mounts={"/data": False, "/data/runs": True})
    check([*GOOD, "--workdir", "/data/runs/a"], place)
    with pytest.raises(UserError, match="/data is mounted to be read only"):
        check([*GOOD, "--workdir", "/data/runs-of-others"], place)
    with pytest.raises(UserError, match="--workdir /data/runs/../../a is not on a disk"):
        check([*GOOD, "--workdir", "/data/runs/../../a"], place)


def test_records_that_the_hosts_share_with_this_machine_are_read(runs):
    here = Place(shares_disks=True)
    command = ["llada-jax", "train", "--config", str(runs.directory / "small.py"), "--workdir", "r"]
    check([*command, f"--config.data.path={runs.dataset}"], here)
    with pytest.raises(UserError, match="prepare"):
        check([*command, f"--config.data.path={runs.directory}"], here)
    longer = [f"--config.data.path={runs.dataset}", "--config.data.sequence_length=4096"]
    with pytest.raises(UserError, match="sequence_length"):
        check([*command, *longer], here)


@pytest.mark.parametrize("command", [["true"], ["bash", "job.sh"], ["python", "-m", "other"]])
def test_another_program_is_not_checked_and_that_is_said(command):
    assert words_of(command) is None
    assert config_of(command) == ""
    assert "is not llada-jax" in check(command, PLACE)


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (["llada-jax", "train", "--config", "a b.py"], "a b.py"),
        (["/opt/venv/bin/llada-jax", "train", "--config=c.py"], "c.py"),
        (["python3", "-m", "llada_jax", "train", "--config", "c.py"], "c.py"),
        (["llada-jax", "train", "--config.seed=1"], ""),
        # as for the command itself, the last one counts
        (["llada-jax", "train", "--config=a.py", "--config", "c.py", "--config.seed=1"], "c.py"),
        (["llada-jax", "train", "--config", "a.py", "--config=c.py"], "c.py"),
    ],
)
def test_the_config_of_a_command_is_found(command, config):
    assert config_of(command) == config
    moved = with_config(command, "/there/c.py")
    assert len(moved) == len(command)
    assert config_of(moved) == ("/there/c.py" if config else "")


# ---- each launcher


LAUNCHERS = {
    gke: ["--name", "run", "--image", "i:1", "--topology", "v5p-8"],
    tpu_vm: ["--name", "run", "--zone", "z", "--topology", "v5p-8"],
    slurm: ["--nodes", "2", "--gpus-per-node", "8"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda module: module.__name__)
def test_every_launcher_refuses_before_it_starts_anything(launcher, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")  # whatever it would start is not found
    words = [*LAUNCHERS[launcher], "--", *TRAIN, "--workdir", "gs://b/run"]
    assert launcher.main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "config.data.path" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda module: module.__name__)
def test_a_launcher_can_be_told_not_to_check(launcher, capsys):
    words = [*LAUNCHERS[launcher], "--unchecked", "--dry-run", "--", "llada-jax", "trian"]
    assert launcher.main(words) == 0
    assert "trian" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", [gke, tpu_vm], ids=lambda module: module.__name__)
def test_a_launcher_checks_the_command_for_its_mounts_and_slices(launcher, capsys):
    data = "--config.data.path=gs://b/data"

    def error_of(*flags: str, workdir: str, knob: str = data) -> str:
        command = [*TRAIN, "--workdir", workdir, data, knob]
        status = launcher.main([*LAUNCHERS[launcher], *flags, "--dry-run", "--", *command])
        error = capsys.readouterr().err
        assert status in (0, 2)
        return error if status else ""

    written = "/runs is mounted to be read only"
    assert written in error_of("--gcs-fuse", "my-bucket:/runs:ro", workdir="/runs/a")
    assert not error_of("--gcs-fuse", "my-bucket:/runs/", workdir="/runs/a")
    assert "of the 2 slices" in error_of("--slices", "2", workdir="gs://b/run")
    assert not error_of("--slices", "2", workdir="gs://b/run", knob="--config.mesh.data=2")


def test_the_mesh_of_a_job_is_that_of_the_gpus_of_all_nodes(capsys):
    command = [*TRAIN, "--workdir", "/runs/a", "--config.data.path=/corpus"]
    words = ["--gpus-per-node", "8", "--container-image", "i", "--dry-run", "--", *command]
    for nodes, status in ((1, 2), (2, 0), (4, 2)):
        assert slurm.main(["--nodes", str(nodes), *words, "--config.mesh.fsdp=16"]) == status
        error = capsys.readouterr().err
        assert status == 0 or f"needs 16 devices, and there are {8 * nodes}" in error


def test_a_run_is_not_kept_in_the_memory_of_its_pods(capsys):
    command = [*TRAIN, "--workdir", "/local/run", "--config.data.path=gs://b/data"]
    words = [*LAUNCHERS[gke], "--ramdisk", "/local", "--dry-run", "--", *command]
    assert gke.main(words) == 2
    assert "--workdir /local/run is not on a disk that the hosts share" in capsys.readouterr().err


def test_workers_have_the_disks_of_an_own_script_and_the_extras_that_are_asked_for(
    tmp_path, capsys
):
    (tmp_path / "mount.sh").write_text("true\n")
    words = [*LAUNCHERS[tpu_vm], "--dry-run"]
    command = ["llada-jax", "evaluate", "--checkpoint", "/mnt/run", "--tasks", "gsm8k"]
    flags = {"is not on a disk that": ["--set-up", str(tmp_path / "mount.sh")]}
    flags["'eval', and the hosts have"] = ["--extra", "eval"]
    for missing, given in flags.items():
        others = [word for flag in flags.values() if flag is not given for word in flag]
        assert tpu_vm.main([*words, *others, "--", *command]) == 2
        assert missing in capsys.readouterr().err
        assert tpu_vm.main([*words, *others, *given, "--", *command]) == 0
