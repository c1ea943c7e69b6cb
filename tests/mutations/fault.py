"""What a planted fault is."""

from typing import NamedTuple


class Fault(NamedTuple):
    """In `file`, `old` (which occurs once) becomes `new`; `tests` are words for pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def faults_of(
    file: str, tests: str, *edits: tuple[str, str, str] | tuple[str, str, str, str]
) -> list[Fault]:
    """Returns the faults (name, old, new) of one file; a fourth entry names other tests."""
    return [
        Fault(name, file, old, new, other[0] if other else tests)
        for name, old, new, *other in edits
    ]
