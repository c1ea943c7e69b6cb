"""Optimizers and schedules of the user's own: what works, and what is refused beforehand."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.paths import ROOT

from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.training.optim import make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs

PARAMS = {"embed": jnp.array([1.0, -2.0])}


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs/examples"), str(ROOT / "tests")])


def schedule_of(name: str, *arguments):
    knobs = {**default_config().schedule, "name": name, "arguments": arguments, "warmup_steps": 4}
    return make_schedule(**knobs, num_steps=8, tokens_per_step=64)


def optimizer_of(name: str, *arguments):
    knobs = {**optimizer_knobs(default_config().optimizer), "weight_decay": 0.0, "clip_norm": 0.0}
    return make_optimizer(lambda step: 0.1, **{**knobs, "name": name, "arguments": arguments})


def test_an_own_schedule_gets_the_knobs_its_arguments_and_the_warm_up():
    schedule = schedule_of("staircase:staircase", ("num_stairs", 2))
    rates = [float(schedule(step)) for step in range(8)]
    np.testing.assert_allclose(rates[:4], 4e-4 * np.arange(1, 5) / 4, rtol=1e-6)
    np.testing.assert_allclose(rates[4:], 1e-5, rtol=1e-4)


def test_an_own_optimizer_goes_downhill_at_the_learning_rate():
    optimizer = optimizer_of("sign_momentum:sign_momentum")
    gradients = {"embed": jnp.array([5.0, -0.1])}
    updates, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embed"], [-0.1, 0.1], rtol=1e-6)
    updates, _ = optimizer.update({"embed": jnp.array([-0.1, 0.0])}, state, PARAMS)
    np.testing.assert_allclose(updates["embed"], [-0.1, 0.1], rtol=1e-6)  # momentum carries on


# ---- parts that break the contract, named below as training.test_own_parts:NAME would be

ours = sys.modules[__name__]


def no_schedule(**_):
    return 1e-3


def vector_schedule(**_):
    return lambda step: jnp.ones(3) * step


def integer_schedule(**_):
    return lambda step: step


def two_arguments_schedule(**_):
    return lambda step, more: 1.0


def no_optimizer(*, b1, b2, eps):
    return lambda gradients: gradients


def half_optimizer(*, b1, b2, eps):
    return optax.stateless(lambda updates, params: {"embed": updates["embed"][:1]})


def growing_optimizer(*, b1, b2, eps):
    return optax.GradientTransformation(
        lambda params: jnp.zeros(1), lambda u, state, params: (u, jnp.concatenate([state, state]))
    )


def failing_optimizer(*, b1, b2, eps):
    return optax.GradientTransformation(
        lambda params: (), lambda u, state, params: (u["missing"], state)
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_schedule", "returns a float; it must return a function"),
        ("vector_schedule", r"gives float32\[3\] for a step; .* one floating-point number"),
        ("integer_schedule", r"gives int32\[\] for a step"),
        ("two_arguments_schedule", "missing a required argument: 'more'"),
    ],
)
def test_a_schedule_that_breaks_the_contract_is_refused(name, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_parts", ours)
    with pytest.raises(UserError, match=f"schedule 'broken_parts:{name}' .*{said}"):
        schedule_of(f"broken_parts:{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_optimizer", "returns a function; it must return an optax.GradientTransformation"),
        ("half_optimizer", "updates that differ from the parameters"),
        ("growing_optimizer", "a state with another structure, shape or dtype"),
        ("failing_optimizer", r"test_own_parts.py, line \d+ \(KeyError: 'missing'\)"),
    ],
)
def test_an_optimizer_that_breaks_the_contract_is_refused(name, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "broken_parts", ours)
    with pytest.raises(UserError, match=f"The optimizer 'broken_parts:{name}' .*{said}"):
        jax.eval_shape(optimizer_of(f"broken_parts:{name}").init, PARAMS)


def test_an_argument_that_a_part_does_not_take_is_named():
    with pytest.raises(UserError, match="unexpected keyword argument 'stairs'"):
        schedule_of("staircase:staircase", ("stairs", 2))


def named(*, learning_rate, num_steps, kind, name, **_):
    assert (kind, name) == ("linear", "a name")
    return lambda step: jnp.float32(learning_rate)


def test_an_argument_may_have_any_name_but_those_that_the_run_gives(monkeypatch):
    monkeypatch.setitem(sys.modules, "named_parts", ours)
    schedule = schedule_of("named_parts:named", ("kind", "linear"), ("name", "a name"))
    assert float(schedule(7)) == pytest.approx(4e-4)
    with pytest.raises(UserError, match="is given num_steps= by the run; leave it out of config.s"):
        schedule_of("named_parts:named", ("num_steps", 2))
    with pytest.raises(UserError, match="is given b1= by the run"):
        optimizer_of("sign_momentum:sign_momentum", ("b1", 0.5))
