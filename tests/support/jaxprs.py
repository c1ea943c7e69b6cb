"""The programs that JAX traces, with the programs inside of them."""

from collections.abc import Iterator

import jax
from jax.extend import core


def programs(jaxpr) -> Iterator:
    """Yields a jaxpr and all jaxprs inside of it: bodies of scans, recomputed parts, calls."""
    yield jaxpr
    is_program = lambda p: isinstance(p, core.ClosedJaxpr | core.Jaxpr)  # noqa: E731
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(parameter):
                yield from programs(getattr(parameter, "jaxpr", parameter))


def equations(jaxpr) -> Iterator:
    """Yields all equations of a jaxpr, those of inner programs too."""
    for program in programs(jaxpr):
        yield from program.eqns
