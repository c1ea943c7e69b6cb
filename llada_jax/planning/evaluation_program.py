"""The compiled programs of evaluation on devices that are not there, and what they need of their
memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llada_jax.cluster import sharding
from llada_jax.evaluation.answer_rows import Rows, nll_of_answers
from llada_jax.evaluation.likelihood import batch_sums
from llada_jax.models.model import Model
from llada_jax.objectives.objective import Objective


def traced_bound(
    model: Model,
    params: dict,
    objective: Objective,
    *,
    num_rows: int,
    sequence_length: int,
    mesh: Mesh,
) -> Any:
    """Returns the program that scores one batch of a split under one corruption, as
    llada_jax.evaluation.splits.bound_of_split runs it: traced, but not compiled.

    Args:
        params: arrays or shapes, on the mesh.
        num_rows: see llada_jax.evaluation.splits.rows_at_a_time.
    """
    place = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            field.shape(num_rows, sequence_length),
            field.dtype,
            sharding=sharding.leading_dims(place, len(field.dims)),
        )
        for name, field in objective.batch.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    with jax.set_mesh(mesh):
        return batch_sums.trace(
            params,
            {},
            batch,
            key,
            rows,
            objective=objective,
            nll_fn=model.nll_fn,
            num_rows=num_rows,
        )


def traced_answers(
    model: Model,
    params: dict,
    *,
    num_rows: int,
    before: int,
    answer: int,
    mesh: Mesh,
    is_guided: bool = False,
) -> Any:
    """Returns the program that scores answers of `answer` tokens behind `before` others, as
    llada_jax.evaluation.answer_rows.run runs it: traced, but not compiled.

    Args:
        params: arrays or shapes, on the mesh.
        num_rows: a multiple of the ways in which the mesh splits a batch.
        before, answer: as llada_jax.evaluation.answer_rows.bucket makes them.
    """
    place = NamedSharding(mesh, sharding.spec(("act_batch", None)))

    def array(length: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((num_rows, length), dtype, sharding=place)

    width = before + answer
    rows: Any = Rows(array(width), array(width), array(width), array(answer), array(answer, bool))
    with jax.set_mesh(mesh):
        return nll_of_answers.trace(
            params,
            rows,
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.float32),
            hidden_fn=model.hidden_fn,
            head_fn=model.head_fn,
            start=before,
            is_guided=is_guided,
        )
