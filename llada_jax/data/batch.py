"""What a batch is made of: the one list of its arrays, with their dtypes and dims.

The loader fills these fields, the train step is compiled for them, and an objective may ask for
more (llada_jax.objectives.objective.Objective.batch).
"""

from collections.abc import Mapping
from typing import NamedTuple

from llada_jax.errors import UserError


class Field(NamedTuple):
    """One array of a batch. dims: "BT", one entry per position, or "B", one entry per row."""

    dtype: str
    dims: str = "BT"

    def shape(self, num_rows: int, sequence_length: int) -> tuple[int, ...]:
        """Returns the shape in a batch of that many rows."""
        sizes = {"B": num_rows, "T": sequence_length}
        return tuple(sizes[dim] for dim in self.dims)


FIELDS = {
    "tokens": Field("int32"),  # clean; 0 in padding
    "segment_ids": Field("int32"),  # the number of the document, from 1; 0 is padding
    "positions": Field("int32"),  # from 0; they begin again where attention stops at documents
    "is_maskable": Field("bool"),  # what the loss may score; never padding
}

# Of data sets of pairs (`prepare --chat records=pairs`), whose rows hold whole pairs: the chosen
# answer is in an odd segment, and the rejected one to the same prompt in the segment after it.
PAIR_FIELDS = {**FIELDS, "is_chosen": Field("bool")}


def check_fields(needed: Mapping[str, Field], provided: Mapping[str, Field], *, by: str) -> None:
    """Raises UserError when the data lack a field, or hold it with another dtype or other dims.

    Args:
        by: who needs the fields, as the subject of the message.
    """
    for name, field in needed.items():
        if field.dims not in ("B", "BT"):
            raise UserError(
                f"{by} describes the batch field {name!r} with the dims {field.dims!r}; a field "
                "has one entry per row ('B') or one per position ('BT')."
            )
        if name not in provided:
            raise UserError(
                f"{by} needs the batch field {name!r} ({field.dtype}, dims {field.dims}), and "
                f"these data hold only {', '.join(provided)}; prepare data that hold it, or "
                "choose another objective."
            )
        if provided[name] != field:
            raise UserError(
                f"{by} needs the batch field {name!r} as {field.dtype} with dims {field.dims}, and "
                f"these data hold it as {provided[name].dtype} with dims {provided[name].dims}; "
                "change one of them."
            )


def check_copies(batch_size: int, copies: int) -> None:
    """Raises UserError when a batch would end within the rows that hold one record."""
    if batch_size % copies:
        raise UserError(
            f"config.data.batch_size={batch_size} must be a multiple of {copies}, because the "
            f"objective asks for {copies} rows of each record; change it."
        )
