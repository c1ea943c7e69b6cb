"""Any objective with the network frozen and low-rank adapters in its place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from llada_jax.errors import UserError
from llada_jax.models.adapters import Lora, joined, make_adapters, stored
from llada_jax.objectives.objective import Objective


def adapted(objective: Objective, lora: Lora) -> Objective:
    """Returns the objective whose params are the adapters and whose frozen part is the network.

    Raises:
        UserError: the objective splits the parameters itself.
    """
    if objective.split_parameters is not None and not objective.has_reference:
        raise UserError(
            f"config.lora.rank={lora.rank} freezes the network, and the objective decides itself "
            "what is frozen; set the rank to 0, or choose another objective."
        )

    def over_adapters(function: Callable) -> Callable:
        def adapted_function(
            nll_fn: Callable, params: dict, *arguments: Any, frozen: dict, **options: Any
        ) -> Any:
            def nll_of_adapters(adapters: dict, *rest: Any) -> Any:
                return nll_fn(joined(frozen, adapters, lora), *rest)

            # fresh adapters add nothing to the network: the reference costs no memory
            reference = jax.tree.map(jnp.zeros_like, params) if objective.has_reference else {}
            return function(nll_of_adapters, params, *arguments, frozen=reference, **options)

        return adapted_function

    def split(network: dict, key: Array) -> tuple[dict, dict]:
        return make_adapters(network, key, lora), stored(network, lora)

    loss = over_adapters(objective.loss)
    is_one = objective.bound is objective.loss
    return dataclasses.replace(
        objective,
        loss=loss,
        bound=loss if is_one else over_adapters(objective.bound),
        split_parameters=split,
        # not added up, as samples during training would then hold a second network, in float32
        network=lambda params, frozen: joined(frozen, params, lora),
    )
