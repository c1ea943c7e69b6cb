"""What traced programs compute."""

import jax


def shapes_of(jaxpr) -> set[tuple[int, ...]]:
    """Returns the shapes of everything that a program computes, also inside of loops and calls."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {getattr(out.aval, "shape", ()) for out in equation.outvars}
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                shapes |= shapes_of(inner)
    return shapes
