"""Presets of compiler flags: the installed compilers know them, and launchers apply them."""

import os
import re
import subprocess
import sys

import pytest
from support.paths import LAUNCH, ROOT
from support.required import compiler_environment

from llada_jax.cluster.compiler_flags import FLAGS, check_flags, flags_named
from llada_jax.errors import UserError


def test_presets_join_into_one_environment():
    both = flags_named("v6e+sdc-check")["LIBTPU_INIT_ARGS"]
    assert both == " ".join(FLAGS[name]["LIBTPU_INIT_ARGS"] for name in ("v6e", "sdc-check"))
    assert flags_named("hopper")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert flags_named("") == {}
    with pytest.raises(
        UserError, match="Unknown preset of compiler flags 'v6'. Did you mean 'v6e'"
    ):
        flags_named("v6")


def test_presets_for_another_compiler_are_refused():
    check_flags(flags_named("v6e+sdc-check"), "tpu")
    check_flags(flags_named("hopper"), "gpu")
    check_flags({}, "gpu")
    with pytest.raises(UserError, match="sets LIBTPU_INIT_ARGS, which .* GPUs .* among gpu, hopp"):
        check_flags(flags_named("hopper+v5p"), "gpu")
    with pytest.raises(UserError, match="sets XLA_FLAGS, which .* TPUs .* v6e, tpu7x, sdc-check"):
        check_flags(flags_named("gpu"), "tpu")


def all_flags(platform_variable: str) -> str:
    presets = [name for name, environment in FLAGS.items() if platform_variable in environment]
    assert presets
    return flags_named("+".join(presets))[platform_variable]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_gpu_flags_are_known_to_the_installed_compiler():
    start = "import jax; jax.devices()"
    # and those with which docs/operations.md makes GPUs deterministic
    written = re.findall(r'XLA_FLAGS="(.+?)"', (ROOT / "docs/operations.md").read_text())
    assert "--xla_gpu_deterministic_ops=true" in written[0]
    done = run_python(start, XLA_FLAGS=" ".join([all_flags("XLA_FLAGS"), *written]))
    assert done.returncode == 0, done.stderr
    misspelt = run_python(start, XLA_FLAGS="--xla_gpu_enable_latency_hiding_schedulers=true")
    assert misspelt.returncode != 0, "an unknown flag is no longer refused: this test shows nothing"
    assert "Unknown flag" in misspelt.stderr


@pytest.mark.slow
def test_tpu_flags_are_known_to_libtpu():
    """libtpu ends the process that loads it at a flag that it does not know."""
    environment = {**compiler_environment("tpu"), "JAX_PLATFORMS": "cpu"}
    load = """
import sys
from llada_jax.cluster.hardware import slice_named
from llada_jax.planning.absent_devices import absent_mesh, load_compiler
load_compiler(slice_named("v5p-8"), {"LIBTPU_INIT_ARGS": sys.stdin.read()})
absent_mesh(dict(fsdp=-1), slice_named("v5p-8"), 1)
"""

    def loaded(flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", load],
            input=flags,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )

    done = loaded(all_flags("LIBTPU_INIT_ARGS"))
    assert done.returncode == 0, done.stderr
    misspelt = loaded("--xla_tpu_enable_async_collective_fusions=true")
    assert misspelt.returncode != 0, "an unknown flag is no longer refused: this test shows nothing"
    assert "Unknown command line flag" in misspelt.stderr


@pytest.mark.parametrize(
    ("launcher", "flags", "preset", "other"),
    [
        ("gke", "--name x --topology v6e-16 --image i:1", "v6e+sdc-check", "hopper"),
        ("gke", "--name x --topology 16xh100 --image i:1", "hopper", "v6e"),
        ("tpu_vm", "--name x --topology v6e-16 --zone z", "v6e+sdc-check", "hopper"),
        ("slurm", "--nodes 2", "hopper", "v6e"),
    ],
)
def test_every_launcher_applies_a_preset_by_name(launcher, flags, preset, other):
    script = LAUNCH / f"{launcher}.py"

    def dry_run(preset: str) -> subprocess.CompletedProcess:
        words = [*flags.split(), "--flags", preset, "--unchecked", "--dry-run", "--", "llada-jax"]
        return subprocess.run(
            [sys.executable, str(script), *words], capture_output=True, text=True, check=False
        )

    done = dry_run(preset)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.replace("\\\n", " ").split())
    for words in flags_named(preset).values():
        for word in words.split():
            assert word in printed
    wrong = dry_run("v6f")
    assert wrong.returncode == 2
    assert "Did you mean 'v6e'?" in wrong.stderr
    unread = dry_run(other)
    assert unread.returncode == 2
    assert "does not read; choose among" in unread.stderr
