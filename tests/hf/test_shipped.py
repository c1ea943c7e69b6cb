"""The PyTorch files of an export work in both versions of transformers, without this package:
shipped_checks.py.
"""

import re
from pathlib import Path

import pytest
from support.transformers_versions import VERSIONS, run_python

CHECKS = Path(__file__).parent / "shipped_checks.py"
RUN = """
import pytest, transformers
print("with transformers", transformers.__version__)
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_an_export_work_where_transformers_is(version, tmp_path):
    output = run_python(
        version, RUN, CHECKS, f"--basetemp={tmp_path / 'checks'}", home=tmp_path, timeout=600
    )
    number = {"4.49.0": r"4\.49\.0", "installed": r"5\.\d"}[version]
    assert re.search(f"with transformers {number}", output), output
    # and nothing skipped
    assert re.search(r"^\d{2,} passed(, \d+ warnings?)? in ", output, flags=re.MULTILINE), output
