"""Arguments of the Python interface: one of a wrong type is refused by the name that its caller
wrote.
"""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llada_jax.errors import UserError

# What an annotation accepts, and how a message calls it. Other annotations are not checked: arrays
# come in many types.
ACCEPTED: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    bool: (bool, "True or False"),
    Sequence[int]: (object, "a list of whole numbers"),
}

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """Returns a function that refuses arguments of another type than its signature says.

    Checked are parameters whose annotation is made of int, float, str, bool, Sequence[int] and None
    alone. What a list or an array holds is left to the function.

    Raises:
        UserError: the first argument of a wrong type, when the function is called.
    """
    signature = inspect.signature(function)
    kinds = {name: _kinds(p.annotation) for name, p in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if kinds[name] and not any(_is_a(value, kind) for kind in kinds[name]):
                words = ["None" if kind is None else ACCEPTED[kind][1] for kind in kinds[name]]
                shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
                raise UserError(
                    f"{name}={shown} is a {type(value).__name__}; give {' or '.join(words)}."
                )
        return function(*args, **kwargs)

    return typing.cast(Function, call)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Returns the types of an annotation, () where one of them cannot be checked."""
    is_union = isinstance(annotation, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    kinds = tuple(None if member is types.NoneType else member for member in members)
    return kinds if all(kind is None or kind in ACCEPTED for kind in kinds) else ()


def _is_a(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind == Sequence[int]:
        # An array is not a Sequence to isinstance, and a text is one.
        is_row = hasattr(value, "__getitem__") and getattr(value, "ndim", 1) == 1
        return is_row and not isinstance(value, str | bytes | dict)
    # True is an int to isinstance, and never one here.
    return isinstance(value, ACCEPTED[kind][0]) and (kind is bool or not isinstance(value, bool))
