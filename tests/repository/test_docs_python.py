"""The Python blocks of the documents: they parse and use names that exist; some run."""

import ast
import builtins
import importlib
import re
from pathlib import Path

import pytest
from support.paths import ROOT
from support.transformers_versions import VERSIONS, run_python

from llada_jax.__main__ import main
from llada_jax.config import default_config, load_config
from llada_jax.validation import knobs

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def python_blocks(document: Path) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def defined_in(tree: ast.Module) -> set[str]:
    """Returns the names that a block imports, assigns, or takes as arguments, anywhere in it."""
    names = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    names |= {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return names | {
        (alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names
    }


@pytest.mark.slow
@every_document
def test_python_uses_names_that_exist(document):
    """Names are defined in the block or before it; imports, members, knobs and parts of a model
    exist.
    """
    from llada_jax.pretrained import Pretrained

    config = default_config()
    groups = {path.rpartition(".")[0] for path in knobs(config)}
    defined = set(vars(builtins))
    for block in python_blocks(document):
        tree = ast.parse(block)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        defined |= defined_in(tree)
        unknown = used - defined
        assert not unknown, f"{document.name} uses {unknown} without defining it"
        modules = {}  # name in the block -> what was imported
        for node in ast.walk(tree):
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                if isinstance(node, ast.Import):
                    module = importlib.import_module(alias.name)
                    modules[alias.asname or alias.name] = module
                else:
                    module = importlib.import_module(node.module)
                    is_there = hasattr(module, alias.name) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                    assert is_there, f"{document.name}: {node.module} has no {alias.name}"
                    modules[alias.asname or alias.name] = getattr(module, alias.name)
        models = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and ast.unparse(node.value).startswith("llada_jax.load(")
            for target in node.targets
        }
        members = {*Pretrained.__dataclass_fields__, *vars(Pretrained)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner, _, rest = ast.unparse(node).partition(".")
            if owner in modules and isinstance(node.value, ast.Name):
                assert hasattr(modules[owner], rest), f"{document.name}: {owner} has no {rest}"
            elif owner in models and isinstance(node.value, ast.Name):
                assert rest in members, f"{document.name}: a loaded model has no {rest}"
            elif owner == "config":
                assert rest in {*knobs(config), *groups}, f"{document.name}: config.{rest}"


@every_document
def test_python_for_transformers_never_asks_whether_it_may_run_the_code(document):
    """Without trust_remote_code=True transformers stops and asks, for a tokenizer too."""
    for call in re.findall(r"\.from_pretrained\(.*?\)", document.read_text()):
        assert "trust_remote_code=True" in call, f"{document.name}: {call}"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_python_of_the_hugging_face_page_runs_without_a_question(version, runs, tmp_path):
    workdir = runs.directory / "for-the-snippet"
    if not workdir.exists():
        runs.train(workdir, "num_steps=2", "evaluation.every_steps=0", "checkpoint.every_steps=2")
    assert (
        main(["export", "--checkpoint", str(workdir), "--output", str(tmp_path / "exports/tiny")])
        == 0
    )
    plain, rules, streamed = python_blocks(ROOT / "docs/huggingface.md")
    examples = [plain, rules] if version.startswith("4.") else [plain, rules, streamed]
    answer = run_python(version, "\n".join(examples), home=tmp_path)
    assert "[y/N]" not in answer
    assert answer.startswith("It is a truth")


def test_config_example_is_a_config(tmp_path):
    (example,) = python_blocks(ROOT / "docs/config.md")
    (tmp_path / "example.py").write_text(example)
    assert load_config(str(tmp_path / "example.py")).model.num_layers == 6


@pytest.mark.slow
def test_numerical_check_of_the_mathematics_holds(capsys):
    (check,) = python_blocks(ROOT / "docs/math.md")
    exec(compile(check, "docs/math.md", "exec"), {"__name__": "check"})
    assert capsys.readouterr().out.count("exact bound") == 2
