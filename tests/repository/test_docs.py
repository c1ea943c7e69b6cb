"""What the documents name exists: functions, files, flags, knobs and their values, paths, links."""

import ast
import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from support.configs import check
from support.documents import (
    COMMANDS_OF_0_1_0,
    commands,
    launcher_commands,
    launcher_commands_in,
    prose_of,
)
from support.paths import ROOT

from llada_jax.__main__ import VERBS, main
from llada_jax.config import apply_override, default_config, load_config
from llada_jax.models.transformer import Architecture, num_parameters
from llada_jax.validation import CHOICES, OWN_PARTS, knob, knobs

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(
        page
        for folder in ("docs", "benchmarks", "configs")
        for page in sorted((ROOT / folder).glob("*.md"))
    ),
]
DOCSTRINGS = [*sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "llada_jax").glob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
every_text = pytest.mark.parametrize(
    "file",
    [*DOCUMENTS, *DOCSTRINGS, COMMANDS_OF_0_1_0],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)


def defined_names(source: str) -> set[str]:
    """Returns what a module defines at its top level; members of classes as Class.member."""
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


@every_text
def test_every_command_has_flags_that_exist(file, flags_of_verb):
    for verb, *words in commands(prose_of(file)):
        for word in words:
            if word == "--":  # what follows is the launcher's
                break
            flag = word.partition("=")[0]
            if flag.startswith("--config."):
                assert verb in ("train", "plan", "sweep"), f"{file.name}: {verb} takes no {flag}"
            elif flag.startswith("--"):
                assert flag in flags_of_verb[verb], f"{file.name}: llada-jax {verb} has no {flag}"


@every_text
def test_every_command_gives_its_config_values_that_are_valid_together(file):
    """The knobs of a whole command are applied to its config and checked as the verb does it."""
    for _, *words in commands(prose_of(file)):
        words = words[: words.index("--")] if "--" in words else words
        overrides = [
            word.removeprefix("--config.") for word in words if word.startswith("--config.")
        ]
        overrides = [
            override for override in overrides if not override.startswith("KEY") and "=" in override
        ]
        name = words[words.index("--config") + 1] if "--config" in words[:-1] else ""
        if (ROOT / name).is_file():
            load_config(str(ROOT / name), overrides)
        elif overrides:  # the reader's own config
            config = default_config()
            # a config says in one of two ways how long to train
            config.num_steps = 0 if any(o.startswith("num_tokens=") for o in overrides) else 1
            for override in overrides:
                apply_override(config, override)
            check(config)


@every_document
def test_every_value_of_a_knob_in_the_prose_is_one_that_the_knob_takes(document):
    groups = {path.partition(".")[0] for path in knobs(default_config()) if "." in path}
    path = rf"(?:{'|'.join(sorted(groups))})\.[a-z_0-9]+"
    pattern = rf"(?<![\w./-])(?:--)?(?:config\.)?({path})=([^\s`,;)]+)"
    for path, value in re.findall(pattern, document.read_text()):
        # left open, or quoted for the shell: the test of whole commands reads it
        if value.startswith(("...", "VALUE", '"', "'")):
            continue
        config = default_config()
        apply_override(config, f"{path}={value}")
        known = CHOICES.get(path, [knob(config, path)])
        is_own = path in OWN_PARTS and ":" in value  # a part of the user's, as module:attribute
        assert is_own or knob(config, path) in known, f"{document.name}: {path}={value}"


@pytest.mark.parametrize("launcher", ["local", "slurm", "gke", "tpu_vm"])
def test_every_command_of_a_launcher_has_flags_that_it_takes(launcher, monkeypatch):
    # local.py asks whether the program is there, which is next to this Python.
    bin = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    old = launcher_commands_in([COMMANDS_OF_0_1_0.read_text()], launcher)
    assert old
    for flags, command in [*launcher_commands(launcher), *old]:
        importlib.import_module(launcher).parse([*flags, *(["--", *command] if command else [])])


def paths_of_the_demo() -> set[str]:
    """Returns what `make demo` makes: the values of --output and --workdir."""
    makefile = (ROOT / "Makefile").read_text()
    (home,) = re.findall(r"^RUN := (\S+)$", makefile, flags=re.MULTILINE)
    return {
        path.replace("$(RUN)", home) for path in re.findall(r"--(?:output|workdir) (\S+)", makefile)
    }


def test_demo_makes_a_dataset_and_a_run():
    assert paths_of_the_demo() == {"runs/tiny/data", "runs/tiny/run"}


def check_paths_of_the_demo(file: Path) -> None:
    for path in re.findall(r"(?<![\w/])runs/tiny(?:/[\w.-]+)*", file.read_text()):
        made = [
            made for made in paths_of_the_demo() if f"{path.rstrip('.')}/".startswith(f"{made}/")
        ]
        assert made, (
            f"{file.name} names {path}, and `make demo` makes {sorted(paths_of_the_demo())}"
        )


@pytest.mark.parametrize(
    "file",
    [
        *DOCUMENTS,
        *sorted((ROOT / "configs").glob("*.py")),
        *sorted((ROOT / "llada_jax").rglob("*.py")),
    ],
    ids=lambda path: path.name,
)
def test_every_path_of_the_demo_is_one_that_the_demo_makes(file):
    check_paths_of_the_demo(file)


@every_document
def test_every_checkpoint_that_is_read_was_written(document):
    """A --checkpoint is a --workdir or --output of the same page, or the run of the demo."""
    found = [(words, dict(zip(words, words[1:]))) for words in commands(document.read_text())]
    written = paths_of_the_demo() | {
        flags[flag] for _, flags in found for flag in ("--workdir", "--output") if flag in flags
    }
    for words, flags in found:
        checkpoint = flags.get("--checkpoint", "CKPT").partition("@")[0]
        is_placeholder = checkpoint.isupper()
        assert is_placeholder or checkpoint in written, (
            f"{document.name}: no command writes {checkpoint}: {words}"
        )


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


def test_readme_has_at_most_half_the_words_that_it_once_had():
    assert len((ROOT / "README.md").read_text().split()) <= 2303 // 2


def test_the_page_of_the_configs_lists_every_config():
    named = re.findall(r"^\| \[(\w+)\.py\]", (ROOT / "configs/README.md").read_text(), flags=re.M)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize(
    ("name", "vocab_size"),
    [
        ("debug", 320),
        ("tiny", 4096),
        ("llada_160m", 50_048),
        ("llada_1b", 0),
        ("llada_8b", 0),
        ("llada_8b_128k", 0),
    ],
)
def test_the_pages_give_the_size_of_every_config_of_one_size(name, vocab_size):
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    fields = {key: config.model[key] for key in Architecture.__dataclass_fields__}
    architecture = Architecture(**{**fields, "vocab_size": config.model.vocab_size or vocab_size})
    num_tokens = (
        config.num_tokens or config.num_steps * config.data.batch_size * config.data.sequence_length
    )
    pages = "\n".join((ROOT / page).read_text() for page in ("README.md", "configs/README.md"))
    rows = re.findall(rf"^\| \[(?:configs/)?{name}.py\].*", pages, flags=re.MULTILINE)
    assert rows
    columns = [column for row in rows for column in row.split(" | ")[2:4]]
    for text, number in zip(columns, [num_parameters(architecture), num_tokens] * len(rows)):
        digits, unit = re.match(r"([\d.]+) ([MBT])\b", text).groups()
        assert float(digits) * {"M": 1e6, "B": 1e9, "T": 1e12}[unit] == pytest.approx(
            number, rel=0.03
        ), (text, number)


@every_document
def test_every_make_target_that_is_named_exists(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name in re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), flags=re.MULTILINE):
        assert name in targets


@every_document
def test_every_extra_that_is_named_exists(document):
    setup = (ROOT / "setup.py").read_text()
    for extras in re.findall(r"pip install [^\n]*?\[([a-z0-9,-]+)\]", document.read_text()):
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
        assert not missing, f"docs/config.md does not mention {missing} for config.{path}"


@every_document
def test_no_placeholder_is_left(document):
    assert not re.findall(r"<<.*?>>", document.read_text(), flags=re.DOTALL)
