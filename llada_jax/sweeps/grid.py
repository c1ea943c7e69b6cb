"""Lists of knobs for `def sweep(add)` in a config file, and the runs that such a function adds.

    from llada_jax import sweeps

    def sweep(add):
        add(seed=1)                                      # one run: a top-level knob as a keyword
        add({"optimizer.b2": 0.98}, seed=1)              # knobs of groups as a dict
        rates = {"schedule.learning_rate": [1e-3, 3e-3]}
        for knobs in sweeps.product(rates, {"optimizer.b2": [0.9, 0.95]}):
            add(knobs)                                   # four runs

`product`, `zip` and `chain` take dicts {knob: values} and lists of dicts {knob: value}, and return
such a list.
"""

import builtins
import itertools
import os
from collections.abc import Callable

from llada_jax.errors import UserError

Knobs = dict[str, object]  # {"optimizer.b2": 0.98}


def product(*parts) -> list[Knobs]:
    """Returns every combination of one setting from each part; the last part changes fastest."""
    return [_merged(settings) for settings in itertools.product(*builtins.map(_crossed, parts))]


def zip(*parts) -> list[Knobs]:
    """Returns the first settings of all parts together, then the second ones, and so on.

    Raises:
        UserError: the parts have different lengths. Python's own zip would drop the rest unnoticed.
    """
    columns = [column for part in parts for column in _columns(part)]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise UserError(
            f"sweeps.zip got lists of {lengths} values; give all of them the same length."
        )
    return [_merged(settings) for settings in builtins.zip(*columns)]


def chain(*parts) -> list[Knobs]:
    """Returns the settings of all parts, one part after the other."""
    return [settings for part in parts for settings in _crossed(part)]


def added_by(sweep: Callable) -> list[Knobs]:
    """Returns the knobs of each run that `sweep(add)` adds, in its order."""
    runs = []

    def add(knobs: Knobs | None = None, /, **more) -> None:
        if knobs is not None and not isinstance(knobs, dict):
            raise UserError(
                f"add({knobs!r}) of the sweep must be given a dict, as in "
                "add({'optimizer.b2': 0.98}); loop over a list and add each of its dicts."
            )
        runs.append({name: _plain(value) for name, value in _merged([knobs or {}, more]).items()})

    sweep(add)
    return runs


def _columns(part) -> list[list[Knobs]]:
    """Returns one list of settings for each knob of {knob: values, ...}.

    A list of dicts is one list of settings already.
    """
    if not isinstance(part, dict):
        return [list(part)]
    for name, values in part.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise UserError(
                f"The sweep gives {name!r} the values {values!r}; write a list, as in [{values!r}]."
            )
    return [[{name: value} for value in values] for name, values in part.items()]


def _crossed(part) -> list[Knobs]:
    return [_merged(settings) for settings in itertools.product(*_columns(part))]


def _merged(settings) -> Knobs:
    merged = {}
    for knobs in settings:
        for name, value in knobs.items():
            if name in merged:
                raise UserError(
                    f"The sweep sets {name!r} twice in one run ({merged[name]!r} and {value!r}); "
                    "keep one."
                )
            merged[name] = value
    return merged


def _plain(value):
    """Returns a number of numpy as one of Python, and a path as text, which JSON can hold."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value
