"""The commands that the documents and the docstrings show, and those of version 0.1.0."""

import ast
import importlib
import re
import shlex
from pathlib import Path

from llada_jax.__main__ import VERBS
from support.paths import ROOT

# Every command line that README and docs of version 0.1.0 showed: users have them in scripts.
COMMANDS_OF_0_1_0 = ROOT / "tests/fixtures/commands_0.1.0.md"


def prose_of(file: Path) -> str:
    """Returns a page, or the docstring of a module."""
    return (
        file.read_text()
        if file.suffix == ".md"
        else (ast.get_docstring(ast.parse(file.read_text())) or "")
    )


def commands(text: str) -> list[list[str]]:
    """Returns the words of every `llada-jax VERB ...` in a text, without comments and [ ]."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(rf"llada-jax ((?:{'|'.join(VERBS)})\b[^`\n]*)", text):
        try:
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
        except ValueError:  # the apostrophe of a sentence: prose that mentions a verb
            words = line.split()
        found.append(words)
    return found


def launcher_commands(launcher: str) -> list[tuple[list[str], list[str]]]:
    """Returns (flags of the launcher, words of the command) of every use in the README, in docs/,
    and in the docstrings of the configs and of the launcher.

    A line without `--` has no command, as `--follow` and `--delete`.
    """
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files += sorted((ROOT / "configs").glob("*.py"))
    texts = [importlib.import_module(launcher).__doc__ or "", *map(prose_of, files)]
    return launcher_commands_in(texts, launcher)


def launcher_commands_in(texts: list[str], launcher: str) -> list[tuple[list[str], list[str]]]:
    found = []
    for text in texts:
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            line = line.strip().removeprefix("$ ")
            if not line.startswith(f"python launch/{launcher}.py"):
                continue
            words = shlex.split(line.split("  (")[0], comments=True)[2:]
            at = words.index("--") if "--" in words else len(words)
            found.append((words[:at], words[at + 1 :]))
    return found
