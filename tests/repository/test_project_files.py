"""Files of the project that no program reads: licence, citation, changelog, package metadata."""

import ast
import hashlib
import re

import pytest
import yaml
from support.paths import ROOT

import llada_jax

# Files that are longer than about 500 lines, and the lines that they may have. They may only
# shrink: lower the number when one does, and remove the file when it is no longer too long.
TOO_LONG = {"llada_jax/verbs/train.py": 560, "llada_jax/loaded_model.py": 555}
ABOUT_500, MOST_OF_TESTS = 515, 400


def setup_arguments() -> dict[str, object]:
    """Returns the literal keyword arguments of the call of setup() in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", "") == "setup"]
    found = {}
    for keyword in call.keywords:
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return found


def test_the_licence_is_the_unchanged_apache_licence():
    text = (ROOT / "LICENSE").read_bytes()
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256(text).hexdigest() == digest
    assert setup_arguments()["license"] == "Apache-2.0"


def test_setup_citation_and_changelog_name_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert setup_arguments()["version"] == llada_jax.__version__
    assert citation["version"] == llada_jax.__version__
    released = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert released[0] == llada_jax.__version__


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)
    assert all(entry["authors"] and entry["title"] for entry in citation["references"])
    assert any("2502.09992" in entry["url"] for entry in citation["references"])


def test_no_file_grows_beyond_about_500_lines_and_no_test_beyond_400():
    def lengths(folder):
        return {
            path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
            for path in (ROOT / folder).rglob("*.py")
            if ROOT / "tests/fixtures" not in path.parents
        }

    package, tests = lengths("llada_jax"), lengths("tests")
    assert min(len(package), len(tests)) > 150
    too_long = {file: length for file, length in package.items() if length > ABOUT_500}
    assert set(too_long) == set(TOO_LONG)
    assert {f: n for f, n in too_long.items() if n > TOO_LONG[f]} == {}
    assert {file: n for file, n in tests.items() if n > MOST_OF_TESTS} == {}


def test_installed_packages_say_that_they_are_typed():
    assert "py.typed" in setup_arguments()["package_data"]["llada_jax"]


def test_every_file_that_the_package_reads_is_installed_with_it():
    package = ROOT / "llada_jax"
    patterns = setup_arguments()["package_data"]["llada_jax"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == installed
    assert (ROOT / "llada_jax" / "py.typed").is_file()


@pytest.mark.parametrize(
    ("message", "is_refused"),
    [
        ("s" * 72 + "\n\nA body may have longer lines: " + "b" * 80 + "\n", False),
        ("s" * 73 + "\n", True),
    ],
)
def test_the_hook_refuses_subjects_of_more_than_72_characters(message, is_refused):
    """As pre-commit's pygrep reads them with --multiline: DOTALL and MULTILINE, the whole file."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (hook,) = [hook for hook in hooks if hook["id"] == "subject"]
    assert (hook["stages"], hook["args"]) == (["commit-msg"], ["--multiline"])
    flags = re.MULTILINE | re.DOTALL
    assert bool(re.compile(hook["entry"].encode(), flags).search(message.encode())) == is_refused
