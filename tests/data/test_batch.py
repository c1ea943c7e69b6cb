"""The fields of a batch: what an objective needs is compared with what the data hold."""

import pytest

from llada_jax.data.batch import FIELDS, Field, check_fields
from llada_jax.errors import UserError


def test_a_field_has_one_entry_per_position_or_per_row():
    assert Field("int32").shape(3, 5) == (3, 5)
    assert Field("float32", "B").shape(3, 5) == (3,)


def test_what_the_data_hold_may_be_more_than_what_is_needed():
    check_fields(FIELDS, {**FIELDS, "advantage": Field("float32", "B")}, by="the objective")


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        (Field("float32", "B"), "needs the batch field 'advantage' .* hold only tokens, segment"),
        (Field("float32", "BD"), "dims 'BD'.*per row .*per position"),
    ],
)
def test_a_field_that_is_missing_or_of_another_kind_is_named(needed, said):
    with pytest.raises(UserError, match=f"^The objective.*{said}"):
        check_fields({**FIELDS, "advantage": needed}, FIELDS, by="The objective")


def test_a_field_with_another_dtype_is_named():
    with pytest.raises(UserError, match="'tokens' as int64 .* hold it as int32"):
        check_fields({"tokens": Field("int64")}, FIELDS, by="The objective")
