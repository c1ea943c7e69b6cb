"""The PyTorch files of an export work in both versions of transformers, without this package: what
is checked stands in shipped_checks/.
"""

import re
from pathlib import Path

import pytest
from support.transformers_versions import VERSIONS, run_python

FOLDER = Path(__file__).parent / "shipped_checks"
CHECKS = ("loading", "network", "loss", "sampler")
# --noconftest: the conftest.py of these tests imports this package.
RUN = """
import pytest, transformers
print("with transformers", transformers.__version__)
folder, *words = sys.argv[1:]
sys.path.insert(0, folder)
quiet = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*quiet, "-p", "exported", *words]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_an_export_work_where_transformers_is(version, tmp_path):
    files = [FOLDER / f"{name}.py" for name in CHECKS]
    scratch = f"--basetemp={tmp_path / 'checks'}"
    output = run_python(version, RUN, FOLDER, *files, scratch, home=tmp_path, timeout=600)
    number = {"4.49.0": r"4\.49\.0", "installed": r"5\.\d"}[version]
    assert re.search(f"with transformers {number}", output), output
    # and nothing skipped
    assert re.search(r"^\d{2,} passed(, \d+ warnings?)? in ", output, flags=re.MULTILINE), output


def test_every_file_of_checks_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*CHECKS, "exported"}
