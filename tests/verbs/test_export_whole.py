"""An export appears whole or not at all: kills, other exports, full disks, several processes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.exports import LLADA, assert_same_params, contents_of, export, read_back
from support.hf_directories import random_params
from support.paths import LAUNCH, ROOT

from llada_jax.errors import UserError
from llada_jax.hf import read

KILLED = """
import sys, time
from llada_jax.hf import write
from llada_jax.verbs import export
real, count = write.put, []
def put(*args, **kwargs):
    real(*args, **kwargs)
    count.append(0)
    if len(count) == 9:
        print("in the middle", flush=True)
        time.sleep(600)
write.put = put
export.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_export_and_the_same_command_writes_a_whole_one(
    random_checkpoint, tmp_path
):
    words = ["--checkpoint", str(random_checkpoint), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in the middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    with pytest.raises(UserError, match="no config.json|config.json cannot be read"):
        read.read_config(tmp_path / "out.partial")  # it does not pass for a checkpoint
    (tmp_path / "out.partial" / "custom_generate").mkdir()  # one that was killed later has it
    assert_same_params(
        read_back(export(random_checkpoint, tmp_path / "out", "--dtype", "float32"), LLADA),
        random_params(LLADA),
    )
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_two_exports_into_one_directory_are_kept_apart(random_checkpoint, tmp_path, refused_export):
    words = ["--checkpoint", str(random_checkpoint), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "in the middle\n"
        sentence = refused_export("--checkpoint", random_checkpoint, output=tmp_path / "out")
        assert "Another export is writing into" in sentence
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


@pytest.mark.slow
def test_an_export_is_replaced_only_by_force_and_then_whole(
    random_checkpoint, tmp_path, refused_export
):
    out = export(random_checkpoint, tmp_path / "out", "--shard-size", "20KB")
    before = contents_of(out)
    assert "--force to replace it" in refused_export("--checkpoint", random_checkpoint, output=out)
    assert contents_of(out) == before
    export(random_checkpoint, out, "--force", "--ema", "--dtype", "float32")
    assert sorted(file.name for file in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert_same_params(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.tex"],
        # a project, a published checkpoint, our own sources, adapters that peft has saved
        ["config.json", "src/thesis.tex"],
        ["config.json", "model.safetensors", "modeling_llada.py"],
        ["masked_diffusion.py", "sft.py"],
        ["adapter_config.json", "adapter_model.safetensors", "README.md"],
    ],
)
def test_force_never_removes_what_is_not_an_export(
    names, random_checkpoint, tmp_path, refused_export
):
    home = tmp_path / "home"
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    for flags in ([], ["--force"]):
        assert "does not hold an export" in refused_export(
            "--checkpoint", random_checkpoint, *flags, output=home
        )
    assert sorted(contents_of(home)) == sorted(names)
    assert "is a file" in refused_export("--checkpoint", random_checkpoint, output=home / names[0])


@pytest.mark.slow
def test_an_empty_directory_and_an_export_of_an_older_version_are_replaced(
    random_checkpoint, tmp_path
):
    (tmp_path / "empty").mkdir()
    assert (export(random_checkpoint, tmp_path / "empty") / "config.json").exists()
    older = Path(shutil.copytree(ROOT / "tests/fixtures/version_0.1/export", tmp_path / "older"))
    assert_same_params(
        read_back(export(random_checkpoint, older, "--force", "--dtype", "float32"), LLADA),
        random_params(LLADA),
    )


@pytest.mark.slow
def test_an_export_that_was_killed_while_it_replaced_another_gives_that_one_back(
    random_checkpoint, tmp_path, refused_export
):
    out = export(random_checkpoint, tmp_path / "out")
    out.rename(tmp_path / "out.replaced")  # the moment between the two renames
    export(random_checkpoint, out, "--ema", "--dtype", "float32", "--force")
    assert_same_params(read_back(out, LLADA), random_params(LLADA, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# too small for the weights; just too small for what comes after them
@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "204k"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    size, random_checkpoint, mount, refused_export
):
    disk = mount(f"size={size}")
    sentence = refused_export(
        "--checkpoint", random_checkpoint, "--dtype", "float32", output=disk / "out"
    )
    assert "No space left on device" in sentence
    assert "free some space" in sentence


@pytest.mark.slow
def test_a_full_disk_keeps_the_export_that_was_to_be_replaced(
    random_checkpoint, mount, refused_export
):
    disk = mount("size=300k")
    out = export(random_checkpoint, disk / "out")
    before = contents_of(out)
    assert "No space left" in refused_export(
        "--checkpoint", random_checkpoint, "--force", "--dtype", "float32", output=out
    )
    assert contents_of(out) == before


def test_a_read_only_output_is_one_sentence(random_checkpoint, tmp_path, mount, refused_export):
    disk = mount("ro")
    assert "Read-only file system" in refused_export(
        "--checkpoint", random_checkpoint, output=disk / "out"
    )
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused_export(
        "--checkpoint", random_checkpoint, output=tmp_path / "file" / "out"
    )


@pytest.mark.slow
def test_several_processes_write_what_one_writes(random_checkpoint, tmp_path):
    alone = export(
        random_checkpoint, tmp_path / "alone", "--shard-size", "20KB", "--dtype", "float32"
    )
    launcher = LAUNCH / "local.py"
    words = [
        "--checkpoint",
        random_checkpoint,
        "--output",
        tmp_path / "together",
        "--shard-size",
        "20KB",
        "--dtype",
        "float32",
    ]
    command = [sys.executable, "-m", "llada_jax", "export", *words, "--json"]
    done = subprocess.run(
        list(
            map(
                str,
                [
                    sys.executable,
                    launcher,
                    "--processes",
                    2,
                    "--devices",
                    1,
                    "--logs",
                    tmp_path,
                    "--",
                    *command,
                ],
            )
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # gloo, which joins processes, talks on stdout
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] > 0
    ours, theirs = (contents_of(directory) for directory in (alone, tmp_path / "together"))
    ours["README.md"], theirs["README.md"] = b"", b""  # they are called alone and together
    assert ours == theirs
    # one that cannot write informs the others, and nothing is left
    (tmp_path / "file").write_text("")
    words[3] = tmp_path / "file" / "out"
    command = [sys.executable, "-m", "llada_jax", "export", *words]
    done = subprocess.run(
        list(
            map(
                str,
                [
                    sys.executable,
                    launcher,
                    "--processes",
                    2,
                    "--devices",
                    1,
                    "--logs",
                    tmp_path,
                    "--",
                    *command,
                ],
            )
        ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "process 0 failed; its log says why" in (tmp_path / "process-1.log").read_text()
