"""What the documents say exists: functions, files, flags, knobs with their defaults, commands,
links.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from support.paths import ROOT

from llada_jax.__main__ import VERBS, main
from llada_jax.config import CHOICES, apply_override, default_config, knob, knobs, load_config
from llada_jax.models.transformer import Architecture, num_parameters

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
DOCSTRINGS = [*sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "llada_jax").glob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


def defined_names(source: str) -> set[str]:
    """Returns what a module defines at its top level, and the members of its classes as
    Class.member.
    """
    names = set()

    def collect(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = (
                node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            )
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(source).body, "")
    return names


def commands(text: str) -> list[list[str]]:
    """Returns the words of every `llada-jax VERB ...` in a text, continued lines joined, comments
    and [ ] dropped.
    """
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(rf"llada-jax ((?:{'|'.join(VERBS)})\b[^`\n]*)", text):
        try:
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
        except ValueError:  # the apostrophe of a sentence: prose that mentions a verb
            words = line.split()
        found.append(words)
    return found


def knobs_mentioned(text: str) -> set[str]:
    return {
        path.rstrip(".") for path in re.findall(r"(?<![\w])config\.([a-z_0-9.]*[a-z_0-9])", text)
    }


@pytest.fixture(scope="module")
def flags_of_verb() -> dict[str, set[str]]:
    """Returns the flags that `llada-jax VERB --help` shows."""
    import contextlib
    import io

    flags = {}
    for verb in VERBS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main([verb, "--help"])
        flags[verb] = set(re.findall(r"--[a-z][a-z-]*(?![\w.])", out.getvalue()))
    return flags


def table_rows(text: str) -> dict[str, tuple[str, str]]:
    """Returns {knob: (default, meaning)} of the tables of docs/config.md."""
    rows = re.findall(r"^\| `([a-z_.0-9]+)` \| `(.+?)` \| (.+) \|$", text, flags=re.MULTILINE)
    return {path: (default, meaning) for path, default, meaning in rows}


@every_document
def test_every_file_and_function_that_is_named_exists(document):
    for path, name in re.findall(r"`([\w./-]+\.py)(?::([\w.]+))?`", document.read_text()):
        file = next(
            (
                base / path
                for base in (ROOT, document.parent, ROOT / "llada_jax")
                if (base / path).is_file()
            ),
            None,
        )
        assert file, f"{document.name} names {path}, which does not exist"
        assert not name or name in defined_names(file.read_text()), (
            f"{document.name}: {path} defines no {name}"
        )


def test_tour_names_many_functions():
    assert len(re.findall(r"`[\w./]+\.py:[\w.]+`", (ROOT / "docs/tour.md").read_text())) > 40


@every_document
def test_relative_links_and_their_anchors_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            slugs = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, f"{document.name} links to {target}; {path} has {sorted(slugs)}"


@pytest.mark.parametrize(
    "file", [*DOCUMENTS, *DOCSTRINGS], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_every_command_has_flags_that_exist_and_knobs_that_take_the_value(file, flags_of_verb):
    text = (
        file.read_text()
        if file.suffix == ".md"
        else (ast.get_docstring(ast.parse(file.read_text())) or "")
    )
    for verb, *words in commands(text):
        for word in words:
            if word == "--":  # what follows is the launcher's
                break
            flag = word.partition("=")[0]
            if flag.startswith("--config."):
                assert verb in ("train", "plan", "sweep"), f"{file.name}: {verb} takes no {flag}"
                config, path = default_config(), flag.removeprefix("--config.")
                if "=" in word and path != "KEY":
                    apply_override(config, word.removeprefix("--config."))
                    assert knob(config, path) in CHOICES.get(path, [knob(config, path)]), word
            elif flag.startswith("--"):
                assert flag in flags_of_verb[verb], f"{file.name}: llada-jax {verb} has no {flag}"


def test_readme_shows_a_command_of_every_verb():
    found = commands((ROOT / "README.md").read_text())
    assert {verb for verb, *flags in found if flags} == set(VERBS)


@every_document
def test_every_knob_that_is_named_exists(document):
    config = default_config()
    groups = {path.rpartition(".")[0] for path in knobs(config)}
    for path in knobs_mentioned(document.read_text()):
        is_file = path in ("py", "md", "json")  # config.py
        assert is_file or path in knobs(config) or path in groups, (
            f"{document.name} names config.{path}"
        )


@every_document
def test_every_config_that_is_named_exists(document):
    for name in re.findall(r"configs/(\w+)\.py", document.read_text()):
        assert (ROOT / "configs" / f"{name}.py").is_file(), (
            f"{document.name} names configs/{name}.py"
        )


def test_readme_lists_every_config():
    named = set(re.findall(r"configs/(\w+)\.py", (ROOT / "README.md").read_text()))
    assert named >= {path.stem for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [("debug", 320), ("tiny", 4096), ("llada_160m", 50_048), ("llada_1b", 0), ("llada_8b", 0)],
)
def test_readme_tells_the_size_of_every_config(name, vocab_size):
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    fields = {key: config.model[key] for key in Architecture.__dataclass_fields__}
    architecture = Architecture(**{**fields, "vocab_size": config.model.vocab_size or vocab_size})
    num_tokens = (
        config.num_tokens or config.num_steps * config.data.batch_size * config.data.sequence_length
    )
    (row,) = re.findall(
        rf"^\| \[configs/{name}.py\].*", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    parameters, tokens = row.split(" | ")[2:4]
    for text, number in ((parameters, num_parameters(architecture)), (tokens, num_tokens)):
        digits, unit = re.match(r"([\d.]+) ([MBT])\b", text).groups()
        assert float(digits) * {"M": 1e6, "B": 1e9, "T": 1e12}[unit] == pytest.approx(
            number, rel=0.03
        ), (text, number)


@every_document
def test_every_make_target_that_is_named_exists(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name in re.findall(r"(?:`|^    )make ([a-z]+)", document.read_text(), flags=re.MULTILINE):
        assert name in targets


@every_document
def test_every_extra_that_is_named_exists(document):
    setup = (ROOT / "setup.py").read_text()
    for extras in re.findall(r"pip install [^\n]*?\[([a-z,]+)\]", document.read_text()):
        for name in extras.split(","):
            assert re.search(rf'"{name}": ', setup), f"{document.name} installs [{name}]"


def test_config_page_has_every_knob_with_its_default():
    rows, config = table_rows((ROOT / "docs/config.md").read_text()), default_config()
    assert set(rows) == set(knobs(config))
    for path, (default, _) in rows.items():
        value = ast.literal_eval(default)
        assert value == knob(config, path), (
            f"config.{path} is {knob(config, path)!r}, docs/config.md says {default}"
        )
        assert type(value) is type(knob(config, path)), (
            f"docs/config.md gives config.{path} another type: {default}"
        )


def test_config_page_has_every_choice():
    rows = table_rows((ROOT / "docs/config.md").read_text())
    for path, choices in CHOICES.items():
        missing = [choice for choice in choices if f"`{choice}`" not in rows[path][1]]
        assert not missing, f"docs/config.md does not tell of {missing} for config.{path}"


def python_blocks(document: Path) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL
    )


def test_config_example_is_a_config(tmp_path):
    (example,) = python_blocks(ROOT / "docs/config.md")
    (tmp_path / "example.py").write_text(example)
    assert load_config(str(tmp_path / "example.py")).model.num_layers == 6


def test_numerical_check_of_the_mathematics_holds(capsys):
    (check,) = python_blocks(ROOT / "docs/math.md")
    exec(compile(check, "docs/math.md", "exec"), {"__name__": "check"})
    assert capsys.readouterr().out.count("exact bound") == 2


def test_python_of_the_readme_uses_what_exists():
    from llada_jax.pretrained import Pretrained

    (example,) = python_blocks(ROOT / "README.md")
    ast.parse(example)
    fields = {*Pretrained.__dataclass_fields__, *vars(Pretrained)}
    assert {name for name in re.findall(r"\bmodel\.(\w+)", example)} <= fields


def test_workdir_files_of_the_tour_are_written(tmp_path):
    """The names in the picture of a workdir are those that the code writes."""
    tour, package = (ROOT / "docs/tour.md").read_text(), ROOT / "llada_jax"
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    for name in ("run.json", "metrics.jsonl", "tensorboard", "profile", "tokenizer", "checkpoints"):
        assert name in tour
        assert json.dumps(name) in source, f"no module writes {name}"


@every_document
def test_no_placeholder_is_left(document):
    assert not re.findall(r"<<.*?>>", document.read_text(), flags=re.DOTALL)
