"""What one host starts, as each launcher renders it: the command, its variables, its packages.

Nothing is rented. A launcher prints what it would do, and scripts for hosts run here up to the
command, for which a small program stands that prints what it was given.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gke
import gke_volumes
import slurm
import tpu_vm
import yaml

from support.gke_manifests import container_of
from support.paths import LAUNCH, ROOT
from support.slurm import in_a_fake_job

RESOURCES = {"google.com/tpu": "tpu", "nvidia.com/gpu": "cuda"}
# Set by the shells between a launcher and its command, and by the stand-ins.
OF_SHELLS = {"_", "OLDPWD", "PATH", "PWD", "SHLVL"}
# Marks the line that the stand-in for the command prints.
GIVEN = "given: "
STAND_IN = f"""#!{sys.executable} -IS
import json, os, sys
print({GIVEN!r} + json.dumps([sys.argv[1:], dict(os.environ)]))
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """What the first process of a run starts with.

    Attributes:
        words: those that follow `llada-jax`.
        variables: those that the launcher sets.
        extras: of setup.py, as the launcher installs them or the image has them.
    """

    words: list[str]
    variables: dict[str, str]
    extras: tuple[str, ...]


def printed(launcher, words: list[str]) -> str:
    """Returns what a launcher prints; it must accept the words."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        assert launcher.main(words) == 0, error.getvalue()
    return out.getvalue()


def extras_of_the_image() -> tuple[str, ...]:
    """Returns the extras of launch/Dockerfile, without that of the chips."""
    (line,) = re.findall(r'"\.\[\$\{EXTRA\},(.*?)\]"', (LAUNCH / "Dockerfile").read_text())
    return tuple(line.split(","))


def on_gke(flags: list[str], command: list[str], directory: Path) -> Start:
    """Returns what the first pod starts; the files of its ConfigMap lie in a directory."""
    text = printed(gke, [*flags, "--dry-run", "--", *command])
    *config_maps, manifest = yaml.safe_load_all(text)
    for name, content in (file for each in config_maps for file in each["data"].items()):
        (directory / name).write_text(content)
    container = container_of(manifest)
    # Kubernetes gives a dollar back for two, and the first pod has the number 0.
    variables = {e["name"]: e.get("value", "0").replace("$$", "$") for e in container["env"]}
    program, *words = (word.replace("$$", "$") for word in container["command"])
    assert program == "llada-jax"
    (resource,) = container["resources"]["limits"]
    return Start(
        [word.replace(gke_volumes.DIRECTORY, str(directory)) for word in words],
        variables,
        (RESOURCES[resource], *extras_of_the_image()),
    )


def on_tpu_vm(flags: list[str], command: list[str], directory: Path) -> Start:
    """Returns what the first worker starts; the directory becomes its home."""
    text = printed(tpu_vm, [*flags, "--dry-run", "--", *command])
    scripts = [word.partition("=")[2] for word in shlex.split(text) if "--command=" in word]
    (extras,) = {found for script in scripts for found in re.findall(r"llada_jax\[(.*?)\]", script)}
    (directory / "llada_jax").symlink_to(ROOT)
    program = directory / "llada_jax.venv" / "bin" / "llada-jax"
    program.parent.mkdir(parents=True)
    write_stand_in(program)
    before = {"HOME": str(directory), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", scripts[-1]], env=before, capture_output=True, text=True, check=True
    )
    return given(done.stdout, before, tuple(extras.split(",")))


def on_slurm(flags: list[str], command: list[str], directory: Path) -> Start:
    """Returns what a task of a job starts, whose environment has no more than its devices need."""
    # the records of a document are not on this machine
    script = printed(slurm, [*flags, "--unchecked", "--dry-run", "--", *command])
    write_stand_in(directory / "llada-jax")
    args, _ = slurm.parse([*flags, "--", *command])
    output = in_a_fake_job(script, directory)
    before = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return given(output, before, ("cuda",) if args.gpus_per_node else ())


def write_stand_in(program: Path) -> None:
    program.write_text(STAND_IN)
    program.chmod(0o755)


def given(output: str, before: dict[str, str], extras: tuple[str, ...]) -> Start:
    """Returns what the stand-in for the command has printed, with the variables that are new."""
    (line,) = [line for line in output.splitlines() if line.startswith(GIVEN)]
    words, after = json.loads(line.removeprefix(GIVEN))
    new = {name: value for name, value in after.items() if before.get(name) != value}
    return Start(words, {name: new[name] for name in new.keys() - OF_SHELLS}, extras)
