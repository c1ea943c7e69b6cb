"""Numbered runs from one config file, and what can be learned from them together.

A config file lists its runs with the functions of `llada_jax.sweeps.grid`, which are exported here:

    from llada_jax import sweeps

    def sweep(add):
        for knobs in sweeps.product({"seed": [0, 1]}, {"optimizer.b2": [0.9, 0.95]}):
            add(knobs)
"""

from llada_jax.sweeps.grid import chain, product, zip

__all__ = ["chain", "product", "zip"]
