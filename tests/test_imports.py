"""The direction of imports, and what each part of the package loads: read from the source, and seen in fresh processes."""

import ast
import graphlib
import keyword
import subprocess
import sys
from pathlib import Path

import pytest

import llada_jax
from llada_jax.__main__ import VERBS
from llada_jax.remote import LIBRARIES

PACKAGE = Path(llada_jax.__file__).parent
CONFIGS = PACKAGE.parent / "configs"

# From the bottom up. A name stands for a module of llada_jax, or for a folder with all that is in it.
LEVELS = {
    "leaf": (
        "llada_jax", "errors", "command_line", "config", "rng", "hardware", "sharding", "tokenizer", "metrics", "preemption",
        "file_lock", "distributed", "goodput", "remote", "hlo", "sweeps",
    ),
    "noun": (
        "corruption", "models", "data", "objectives", "samplers", "likelihood", "baselines", "optim", "hf", "sweep_results",
        "scaling",
    ),
    "run state": ("state", "checkpoint", "local_checkpoint", "run_record", "pretrained", "recipe", "aot"),
    "verb": ("prepare", "train", "rollback", "sample", "chat", "evaluate", "export", "import_", "plan", "sweep"),
    "entry": ("__main__",),
}  # fmt: skip
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}
ORDER = list(LEVELS)


# Copied into every export, where they must stand without this package: tests/hf_modeling_checks.py reads their imports.
SHIPPED = ("configuration_llada", "modeling_llada", "configuration_illada", "modeling_illada", "masked_diffusion")


def source_files() -> dict[str, Path]:
    """Every module of the package by its name below llada_jax, save what is shipped; the package is "llada_jax"."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "hf" and path.stem in SHIPPED:
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        files[".".join(parts) or "llada_jax"] = path
    return files


FILES = source_files()


def imported(path: Path, *, at_import_only: bool = False) -> set[str]:
    """The dotted names that a file imports; at_import_only leaves out imports inside of functions."""
    tree = ast.parse(path.read_text())
    lazy = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    names = set()
    for node in ast.walk(tree):
        if at_import_only and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: absolute names can be searched for"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path, **kwargs) -> set[str]:
    """The modules of the package that a file imports, as keys of FILES."""
    found = set()
    for name in imported(path, **kwargs):
        first, *rest = name.split(".")
        if first != "llada_jax":
            continue
        while rest and ".".join(rest) not in FILES:  # the last part is a function or a class of a module
            rest = rest[:-1]
        found.add(".".join(rest) or "llada_jax")
    return found


def level(module: str) -> int:
    return ORDER.index(LEVEL_OF[module.split(".")[0]])


# `load` is the face of the package: it reaches up from a leaf, but only when it is called.
FACE = {("llada_jax", "pretrained")}
EDGES = {(module, other) for module, path in FILES.items() for other in ours(path)} - FACE


def test_every_module_has_a_level_and_every_verb_is_one():
    assert [module for module in FILES if module.split(".")[0] not in LEVEL_OF] == []
    modules = [f"{verb}_" if keyword.iskeyword(verb) else verb for verb in VERBS]
    assert set(modules) <= set(LEVELS["verb"])
    assert [module for module in modules if module not in FILES] == []


def test_the_source_is_read_as_python_reads_it():
    assert {"config", "data.loader", "state", "errors", "samplers.text", "checkpoint"} <= ours(FILES["train"])
    assert "llada_jax" in ours(FILES["run_record"])
    assert "jax.numpy" in imported(FILES["state"])
    assert ours(FILES["llada_jax"]) == {"pretrained"}
    assert ours(FILES["llada_jax"], at_import_only=True) == set()


def test_imports_run_strictly_downward():
    upward = [(module, other) for module, other in EDGES if level(other) > level(module)]
    assert upward == []


def test_imports_form_no_cycle():
    graph = {module: set() for module in FILES}
    for module, other in EDGES:
        graph[module].add(other)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(FILES)


def test_verbs_import_no_verb():
    assert [(m, o) for m, o in EDGES if LEVEL_OF[m.split(".")[0]] == "verb" and o in LEVELS["verb"]] == []


def test_only_verbs_see_the_config():
    # pretrained fills one in for weights that come from no run: what a Hugging Face directory tells, the rest by default
    assert {module for module, other in EDGES if other == "config"} <= {*LEVELS["verb"], "pretrained"}


def test_the_network_the_objective_and_the_sampler_know_nothing_of_each_other():
    for folder in ("models", "objectives", "samplers"):
        others = {"models", "objectives", "samplers"} - {folder}
        seen = {(m, o) for m, o in EDGES if m.split(".")[0] == folder and o.split(".")[0] in others}
        assert seen == set()


def test_configs_import_the_config_only_and_the_package_never_imports_configs():
    files = sorted(CONFIGS.glob("*.py"))
    assert files
    for path in files:
        assert imported(path) == {"llada_jax.config.default_config"}, path
    assert [module for module, path in FILES.items() if any(n.split(".")[0] == "configs" for n in imported(path))] == []


# ------------------------------------------------------------------------------------------------- in fresh processes


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = ("grain", "array_record", "orbax", "tensorboardX", "sentencepiece", "tokenizers", "transformers", "torch")

BLOCK = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import grain
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the blocker does not block")
"""


def test_the_core_imports_without_the_libraries_that_only_verbs_need():
    core = [
        module for module in FILES
        if module.split(".")[0] in ("models", "objectives", "corruption", "samplers", "optim", "state", "likelihood")
    ]  # fmt: skip
    assert len(core) >= 12
    python(BLOCK + "".join(f"import llada_jax.{module}\n" for module in core))


def test_a_missing_optional_library_is_answered_by_the_line_that_installs_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    code = f"""{BLOCK}
from llada_jax.errors import UserError
from llada_jax.tokenizer import load_tokenizer
try:
    load_tokenizer({str(tmp_path)!r})
except UserError as error:
    print(error)
"""
    assert "'tokenizers', which is not installed: pip install 'llada_jax[hf]'" in python(code)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import llada_jax; llada_jax.__version__", ("jax", "numpy", "flax")),
        ("from llada_jax.__main__ import main; assert main(['--help']) == 0", ("jax", "numpy", "ml_collections")),
        ("import llada_jax.config", ("jax", "flax", "grain", "orbax")),
        ("import llada_jax.prepare", ("jax", "flax", "grain", "orbax", "optax")),
        ("import llada_jax.sweep", ("jax", "flax", "grain", "orbax", "scipy", "optuna", "matplotlib")),
        ("import llada_jax.data.records, llada_jax.data.text, llada_jax.data.packing", ("jax", "flax", "grain")),
        ("import llada_jax.train; llada_jax.train.measure.MetricsWriter({path!r}).close()", ("torch",)),
    ],
    ids=["package", "help", "config", "prepare", "sweep", "data", "train"],
)
def test_nothing_is_loaded_before_it_is_needed(code, absent, tmp_path):
    code = code.format(path=str(tmp_path))
    out = python(f"{code}\nimport sys\nprint('loaded', *[name for name in {absent!r} if name in sys.modules])")
    assert out.splitlines()[-1] == "loaded"


IMPORT_NAME = {"orbax_checkpoint": "orbax"}  # where it is not the name on the package index


def test_every_library_that_is_imported_is_declared():
    setup = ast.parse((PACKAGE.parent / "setup.py").read_text())
    words = [node.value for node in ast.walk(setup) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names = [
        word.split(">=")[0].split("[")[0].replace("-", "_") for word in words if word.count(">=") and word[0] != ">"
    ]
    declared = {IMPORT_NAME.get(name, name) for name in names}
    assert {"jax", "orbax", "ml_collections"} <= declared
    optional = {  # as named to errors.require
        node.args[0].value.split(".")[0]
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "require"
        and isinstance(node.args[0], ast.Constant)
    }
    optional |= set(LIBRARIES.values())  # the one call whose argument is a table's
    assert {"tokenizers", "zstandard", "gcsfs"} <= optional
    loaded = {name.split(".")[0] for path in FILES.values() for name in imported(path)}
    assert (loaded | optional) - declared - set(sys.stdlib_module_names) == {"llada_jax"}
