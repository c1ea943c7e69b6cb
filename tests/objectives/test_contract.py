"""An objective that breaks its contract is refused from its shapes alone, in the user's words."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.contract import check_objective
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective
from llada_jax.objectives.sft import sft
from llada_jax.objectives.vrpo import vrpo

B, T = 4, 8
PARAMS = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
NUMBER = jnp.float32(1)


def good(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen):
    """The smallest loss that keeps the contract."""
    arrays = (batch["tokens"], batch["is_maskable"], batch["segment_ids"], batch["positions"])
    tokens, where, segments, positions = arrays
    loss_sum = nll_fn(params, tokens, tokens, where, segments, positions).nll_BT.sum()
    count = where.sum().astype(jnp.float32)
    return loss_sum, count, {"loss": (loss_sum, count), "nelbo": (loss_sum, count)}


def checked(loss=good, bound=good, **fields) -> dict:
    objective = Objective(loss, bound, **{"bound_name": "nelbo", **fields})
    return check_objective(
        objective,
        PARAMS,
        frozen={},
        num_rows=B,
        sequence_length=T,
        name="mine:good",
        reserved=("grad_norm",),
    )


def returning(change):
    """A loss that returns what `change` makes of (loss_sum, count, metrics)."""
    return lambda *args, **kwargs: change(*good(*args, **kwargs))


@pytest.mark.parametrize(
    ("objective", "frozen"),
    [
        (masked_diffusion(mask_id=9), {}),
        (autoregressive(bos_id=1), {}),
        (sft(mask_id=9), {}),
        # The reference is the network that the run begins with.
        (vrpo(mask_id=9), vrpo(mask_id=9).split_parameters(PARAMS, None)[1]),
    ],
    ids=["masked_diffusion", "autoregressive", "sft", "vrpo"],
)
def test_the_objectives_of_the_package_keep_the_contract(objective, frozen):
    metrics = check_objective(objective, PARAMS, frozen=frozen, num_rows=B, sequence_length=T)
    assert {"loss", objective.bound_name} <= set(metrics)


def test_the_record_names_the_mask_and_the_bound():
    ours, control = masked_diffusion(mask_id=9), autoregressive(bos_id=1)
    assert (ours.mask, ours.bound_name) == (BIDIRECTIONAL, "nelbo")
    assert (control.mask, control.bound_name) == (CAUSAL, "nll")


def test_records_are_hashed_by_identity_and_cannot_be_changed():
    one, other = masked_diffusion(mask_id=9), masked_diffusion(mask_id=9)
    assert len({one, other, one}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bound_name = "nll"


def test_a_good_objective_gives_the_shapes_of_its_metrics():
    metrics = checked()
    assert set(metrics) == {"loss", "nelbo"}
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, c, m: (s, c), "returns a tuple of 2; it must return loss_sum, count"),
        (lambda s, c, m: (s[None], c, m), r"loss_sum as float32\[1\]; it must be a float32 scalar"),
        (lambda s, c, m: (s, c.astype(int), m), r"count as int32\[\]"),
        (lambda s, c, m: (s, 3.0, m), "count as float; it must"),
        (lambda s, c, m: (s.astype(jnp.bfloat16), c, m), r"loss_sum as bfloat16\[\]"),
        (lambda s, c, m: (s, c, [m]), "its metrics as a list"),
        (lambda s, c, m: (s, c, {"loss": (s, c)}), "returns no metric 'nelbo', only loss"),
        (lambda s, c, m: (s, c, {"nelbo": (s, c)}), "returns no metric 'loss', only nelbo"),
        (lambda s, c, m: (s, c, {**m, "more": s}), r"the metric 'more' .* pair \(sum, count\)"),
        (
            lambda s, c, m: (s, c, {**m, "more": (s, jnp.zeros(2))}),
            r"'more' as \(float32\[\], float32\[2\]\)",
        ),
        (
            lambda s, c, m: (s, c, {**m, "more": (jnp.zeros((2, 2)), jnp.zeros((2, 2)))}),
            "vectors of one length",
        ),
        (lambda s, c, m: (s, c, {**m, "grad_norm": (s, c)}), "'grad_norm', which the train step"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(change, said):
    with pytest.raises(UserError, match=f"The loss of the objective 'mine:good' .*{said}"):
        checked(loss=returning(change))


def test_a_bound_that_lacks_its_own_metric_is_refused():
    bound = returning(lambda s, c, m: (s, c, {"nll": (s, c)}))
    with pytest.raises(UserError, match="The bound of .* returns no metric 'nelbo', only nll"):
        checked(bound=bound)


def test_a_loss_with_another_signature_is_refused():
    def without_step(nll_fn, params, batch, key, row_B, *, num_rows, frozen):
        raise AssertionError("it must not be called")

    with pytest.raises(UserError, match="does not take .*unexpected keyword argument 'step'"):
        checked(loss=without_step)


def test_an_error_inside_a_loss_names_its_line():
    def branches(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen):
        return 1 if step > 3 else 2

    with pytest.raises(UserError, match=r"test_contract.py, line \d+ \(TracerBoolConversionError"):
        checked(loss=branches)


def test_a_network_that_is_called_wrongly_is_explained():
    def floats(nll_fn, params, batch, *args, **kwargs):
        tokens = batch["tokens"].astype(jnp.float32)
        return nll_fn(params, tokens, tokens, tokens > 0, tokens, tokens)

    with pytest.raises(UserError, match=r"nll_fn is called with noisy_BT float32\[4,8\]"):
        checked(loss=floats)


def test_a_field_that_the_record_does_not_ask_for_is_not_in_the_batch():
    def reads(nll_fn, params, batch, *args, **kwargs):
        return batch["advantage"]

    with pytest.raises(UserError, match=r"KeyError: 'advantage'"):
        checked(loss=reads)
