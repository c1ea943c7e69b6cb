"""docs/first_steps.ipynb runs from its first cell to its last, and shows what its texts say."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell["source"] for cell in content["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    content = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])


def test_links_of_the_notebook_resolve():
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells("markdown")))
    assert targets
    for target in targets:
        assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
def test_every_cell_runs_in_order(tmp_path, monkeypatch):
    """As Jupyter runs them: Python in one namespace, and lines that begin with ! in a shell."""
    for name in ("llada_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # As users have them: 100 steps take longer than to compile them well.
        "XLA_FLAGS": "",
    }
    names, printed = {}, []
    for source in cells("code"):
        if source.startswith("!"):
            # the console script of this very package, wherever another one is installed
            words = shlex.split(source.removeprefix("!").replace("\\\n", " "))
            assert words[0] == "llada-jax"
            done = subprocess.run(
                [sys.executable, "-m", "llada_jax", *words[1:]],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
        else:
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert max(names["losses"]) == 100
    assert names["losses"][100] < 0.7 * names["math"].log(320)
    assert names["model"].step == 100
    assert names["texts"][0]
    assert "[MASK" not in names["filled"][0]
    assert names["english"].log_likelihood > names["backwards"].log_likelihood
    assert json.loads(printed[-1])["bits_per_byte"] < 6
