"""The direction of imports, and what each part of the package loads: read from the source, and seen
in fresh processes.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import llada_jax
from llada_jax.__main__ import VERBS
from llada_jax.storage.remote import LIBRARIES

PACKAGE = Path(llada_jax.__file__).parent
CONFIGS = PACKAGE.parent / "configs"

# The floors of the house, from the bottom up. A folder of the package is a floor; so is each file
# at its top. A file imports from its own folder and from floors below.
FLOORS = (
    (
        "llada_jax",
        "errors",
        "units",
        "rng",
        "masks",
        "paths",
        "streams",
        "parts",
        "ranges",
        "arguments",
        "schemas",
        "validation",
        "config",
        "progress",
    ),
    ("storage",),
    ("cluster",),
    ("data",),
    ("models",),
    ("objectives", "samplers"),
    ("hf",),
    ("evaluation",),
    ("training",),
    ("checkpoints",),
    ("planning",),
    ("run",),
    ("sweeps",),
    ("request_checks", "sampling_flags"),
    ("conversation",),
    ("loaded_model",),
    ("pretrained",),
    ("verbs",),
    ("sample",),
    ("__main__",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def source_files() -> dict[str, Path]:
    """Returns every module of the package by its name below llada_jax, except what is copied into
    exports.
    """
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "shipped":  # copied into every export, where this package is absent
            continue
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        files[".".join(parts) or "llada_jax"] = path
    return files


FILES = source_files()


def _is_for_type_checkers(node) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imported(path: Path, *, at_import_only: bool = False) -> set[str]:
    """The dotted names that a file imports; at_import_only leaves out imports inside of functions
    and those for type checkers.
    """
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for part in ast.walk(tree)
        if isinstance(part, ast.FunctionDef) or _is_for_type_checkers(part)
        for node in ast.walk(part)
    }
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
        while (
            rest and ".".join(rest) not in FILES
        ):  # the last part is a function or a class of a module
            rest = rest[:-1]
        found.add(".".join(rest) or "llada_jax")
    return found


def room(module: str) -> str:
    """Returns the folder of a module, or the module itself when it is at the top of the
    package.
    """
    return module.split(".")[0]


def floor(module: str) -> int:
    return FLOOR_OF[room(module)]


# The functions of the package itself are its face: they reach up from a leaf, but only when they
# are called.
FACE = {
    ("llada_jax", name) for name in ("pretrained", "run.results", "verbs.evaluate", "verbs.train")
}
EDGES = {(module, other) for module, path in FILES.items() for other in ours(path)} - FACE


def test_every_file_stands_on_a_floor_and_every_verb_is_one():
    assert {room(module) for module in FILES} == set(FLOOR_OF)
    assert [module for module, _ in VERBS.values() if f"verbs.{module}" not in FILES] == []


def test_the_source_is_read_as_python_reads_it():
    seen = ours(FILES["verbs.train"])
    assert {"config", "data.loader", "training.state", "errors", "samplers.text"} <= seen
    assert "checkpoints.record" in seen
    assert "llada_jax" in ours(FILES["checkpoints.record"])
    assert "jax.numpy" in imported(FILES["training.state"])
    assert {("llada_jax", name) for name in ours(FILES["llada_jax"])} == FACE
    assert ours(FILES["llada_jax"], at_import_only=True) == set()


def test_a_file_imports_from_its_own_folder_and_from_floors_below():
    wrong = [
        (module, other)
        for module, other in EDGES
        if floor(other) > floor(module)
        or (floor(other) == floor(module) and room(other) != room(module) and floor(module) > 0)
    ]
    assert wrong == []


def test_imports_form_no_cycle():
    graph = {module: set() for module in FILES}
    for module, other in EDGES:
        graph[module].add(other)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(FILES)


def test_what_has_a_leading_underscore_is_used_by_its_own_file_alone():
    folders = [PACKAGE.parent / name for name in ("launch", "benchmarks", "configs", "docs")]
    others = [path for folder in folders for path in folder.rglob("*.py")]
    files = [*FILES.values(), *others]
    assert min(len(FILES), 10 * len(others)) > 150
    private = [
        (path.name, name)
        for path in files
        for name in imported(path)
        if any(p.startswith("_") and not p.startswith("__") for p in name.split("."))
        and name.split(".")[0] in ("llada_jax", *(file.stem for file in files))
    ]
    assert private == []


def test_verbs_import_no_verb_but_share_the_command_line():
    edges = {(m, o) for m, o in EDGES if room(m) == room(o) == "verbs"}
    assert {other for _, other in edges} == {"verbs.command_line"}


def test_the_config_stops_at_the_verbs():
    """Two nouns make configs and read none: a checkpoint that came from elsewhere, and the runs of
    a sweep.
    """
    importers = {module for module, other in EDGES if other == "config" and room(module) != "verbs"}
    assert importers == {"checkpoints.huggingface", "sweeps.runs"}


def test_the_network_the_objective_and_the_sampler_know_nothing_of_each_other():
    for folder in ("models", "objectives", "samplers"):
        others = {"models", "objectives", "samplers"} - {folder}
        seen = {(m, o) for m, o in EDGES if room(m) == folder and room(o) in others}
        assert seen == set()


def test_configs_import_the_config_only_and_the_package_never_imports_configs():
    files = sorted(CONFIGS.glob("*.py"))
    assert files
    for path in files:
        assert imported(path) == {"llada_jax.config.default_config"}, path
    assert [
        module
        for module, path in FILES.items()
        if any(n.split(".")[0] == "configs" for n in imported(path))
    ] == []


# ---- in fresh processes


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCKED = (
    "grain",
    "array_record",
    "orbax",
    "tensorboardX",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "torch",
)

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


@pytest.mark.slow
def test_the_core_imports_without_the_libraries_that_only_verbs_need():
    core = [
        module
        for module in FILES
        if room(module) in ("models", "objectives", "samplers", "training")
    ]
    core.append("evaluation.likelihood")
    assert len(core) >= 12
    python(BLOCK + "".join(f"import llada_jax.{module}\n" for module in core))


def test_a_missing_optional_library_is_answered_by_the_line_that_installs_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    code = f"""{BLOCK}
from llada_jax.errors import UserError
from llada_jax.data.tokenizer import load_tokenizer
try:
    load_tokenizer({str(tmp_path)!r})
except UserError as error:
    print(error)
"""
    assert "'tokenizers', which is not installed: pip install 'llada_jax[hf]'" in python(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import llada_jax; llada_jax.__version__", ("jax", "numpy", "flax")),
        (
            "from llada_jax.__main__ import main; assert main(['--help']) == 0",
            ("jax", "numpy", "ml_collections"),
        ),
        ("import llada_jax.config", ("jax", "flax", "grain", "orbax")),
        ("import llada_jax.verbs.prepare", ("jax", "flax", "grain", "orbax", "optax")),
        (
            "import llada_jax.verbs.sweep",
            ("jax", "flax", "grain", "orbax", "scipy", "optuna", "matplotlib"),
        ),
        (
            "import llada_jax.data.records, llada_jax.data.text, llada_jax.data.packing",
            ("jax", "flax", "grain"),
        ),
        (
            "import llada_jax.verbs.train; "
            "llada_jax.run.metrics_file.MetricsWriter({path!r}).close()",
            ("torch",),
        ),
    ],
    ids=["package", "help", "config", "prepare", "sweep", "data", "train"],
)
def test_nothing_is_loaded_before_it_is_needed(code, absent, tmp_path):
    code = code.format(path=str(tmp_path))
    out = python(
        f"{code}\nimport sys\nprint('loaded', *[name for name in {absent!r} if name in "
        "sys.modules])"
    )
    assert out.splitlines()[-1] == "loaded"


IMPORT_NAME = {"orbax_checkpoint": "orbax"}  # where it is not the name on the package index


@pytest.mark.slow
def test_every_library_that_is_imported_is_declared():
    setup = ast.parse((PACKAGE.parent / "setup.py").read_text())
    words = [
        node.value
        for node in ast.walk(setup)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    names = [
        word.split(">=")[0].split("[")[0].replace("-", "_")
        for word in words
        if word.count(">=") and word[0] != ">"
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
