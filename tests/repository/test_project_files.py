"""Files of the project that no program reads: licence, citation, changelog, package metadata."""

import ast
import hashlib
import re

import yaml
from support.paths import ROOT

import llada_jax


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
