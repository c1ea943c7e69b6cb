"""The launcher commands that the documents and the docstrings show."""

import importlib
import re
import shlex

from support.paths import ROOT


def launcher_commands(launcher: str) -> list[tuple[list[str], list[str]]]:
    """Returns (flags of the launcher, words of the command) of every use in docs/ and docstrings.

    A line without `--` has no command, as `--follow` and `--delete`.
    """
    texts = [importlib.import_module(launcher).__doc__ or ""]
    texts += [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
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
