"""What the train step promises an objective: the step's number, frozen parameters, own fields."""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.paths import ROOT

from llada_jax.cluster import sharding
from llada_jax.cluster.sharding import AXES, make_mesh
from llada_jax.config import default_config
from llada_jax.data.batch import FIELDS, Field
from llada_jax.errors import UserError
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective
from llada_jax.training.state import (
    TrainState,
    abstract_metrics,
    abstract_state,
    create_state,
    split_abstract,
)
from llada_jax.training.step import architecture_of, compile_step, make_recipe, make_train_step

B, T, MASK = 8, 8, 15
SMALL = Architecture(
    vocab_size=16, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16
)


class Ids:
    mask_id, bos_id, vocab_size = MASK, 14, 16


def batch_of(**more) -> dict:
    tokens = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ones = np.ones_like(tokens)
    return {
        "tokens": tokens,
        "segment_ids": ones,
        "positions": tokens,
        "is_maskable": ones > 0,
        **more,
    }


def config_of(**changes):
    config = default_config()
    config.num_steps = 10
    config.data.batch_size, config.data.sequence_length = B, T
    for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        config.model[name] = getattr(SMALL, name)
    for path, value in changes.items():
        group, key = path.split("__")
        config[group][key] = value
    return config


@pytest.fixture
def parts(monkeypatch):
    """Makes this file importable as `own`, next to the examples of the documentation."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "docs/examples")])
    monkeypatch.setitem(sys.modules, "own", sys.modules[__name__])


# ---- the step


def counts_steps(nll_fn, params, batch, key, row_B, *, num_rows, step, frozen):
    loss_sum, count = params["w"] * 0.0, jnp.float32(1)
    metrics = {"loss": (loss_sum, count), "step": (step.astype(jnp.float32), count)}
    return loss_sum, count, metrics


def test_the_objective_receives_the_number_of_the_step_from_zero():
    optimizer, params = optax.sgd(0.1), {"w": jnp.float32(1.0)}
    objective = Objective(counts_steps, counts_steps, "loss")
    shapes = abstract_metrics(objective, params, num_rows=B, sequence_length=T)
    metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), {}, metrics)
    options = {"seed": 0, "num_rows": B, "num_microbatches": 1, "ema_decay": 0.0}
    step = jax.jit(make_train_step(objective, None, optimizer, lambda step: 0.1, **options))
    seen = []
    for _ in range(4):
        before = state.metrics["step"][0]
        state = step(state, batch_of())
        seen.append(float(state.metrics["step"][0] - before))
    assert seen == [0, 1, 2, 3]


def test_an_annealed_weight_moves_from_the_plain_sum_to_the_bound(parts):
    from annealed import annealed

    def nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        class Scores:
            nll_BT, is_correct_BT = where_BT.astype(jnp.float32), where_BT

        return Scores

    objective = annealed(mask_id=MASK, bos_id=0, vocab_size=16, anneal_steps=10)
    call = functools.partial(
        objective.loss, nll_fn, {}, batch_of(), jax.random.key(0), jnp.arange(B), num_rows=B
    )
    first, middle, last = (call(step=jnp.int32(s), frozen={}) for s in (0, 5, 10))
    assert first[0] == round(float(first[0]))  # one nat per masked token, unweighted
    assert float(middle[0]) == pytest.approx((float(first[0]) + float(last[0])) / 2, rel=1e-6)
    assert last[0] == last[2]["nelbo"][0] == first[2]["nelbo"][0] > first[0]


@pytest.mark.parametrize("max_skipped_updates", [0, 1])
def test_the_knobs_of_a_config_reach_the_step(monkeypatch, max_skipped_updates):
    given = {}
    monkeypatch.setattr(
        "llada_jax.training.step.make_train_step",
        lambda objective, nll_fn, optimizer, schedule, **knobs: given.update(
            knobs, rate=schedule(jnp.int32(3))
        ),
    )
    config = config_of(
        optimizer__max_skipped_updates=max_skipped_updates,
        optimizer__ema_decay=0.25,
        optimizer__gradient_accumulation=2,
        schedule__name="llada",
        schedule__warmup_steps=0,
        # the fourth step begins after 3 B T tokens
        schedule__stages=((2.5 * B * T, 1e-3, 1e-3), (3.5 * B * T, 1e-4, 1e-4)),
    )
    config.seed = 7
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        recipe = make_recipe(config, Ids(), mesh)
    assert float(given.pop("rate")) == pytest.approx(1e-4)
    assert given == {
        "seed": 7,
        "num_rows": B,
        "num_microbatches": 2,
        "ema_decay": 0.25,
        "skip_nonfinite": max_skipped_updates > 0,
    }
    assert jax.tree.structure(recipe.abstract.ema) == jax.tree.structure(recipe.abstract.params)


def test_the_rows_of_a_microbatch_must_fill_the_devices():
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 8})
    with pytest.raises(UserError, match=r"batch_size / config.optimizer.gradient_accumulation\D*4"):
        make_recipe(config_of(optimizer__gradient_accumulation=2), Ids(), mesh)


@pytest.mark.parametrize(
    ("asked", "num_ids", "found"),
    [(0, 16, 64), (0, 64, 64), (0, 65, 128), (16, 16, 16), (100, 65, 100)],
)
def test_the_vocabulary_has_room_for_every_id(asked, num_ids, found):
    tokenizer = SimpleNamespace(vocab_size=num_ids)
    config = config_of(model__vocab_size=asked)
    assert architecture_of(config.model, tokenizer).vocab_size == found
    config.model.vocab_size = num_ids - 1
    with pytest.raises(UserError, match=f"vocab_size={num_ids - 1} is smaller than .* {num_ids} "):
        architecture_of(config.model, tokenizer)


# ---- frozen parameters


def with_adapters(objective: Objective) -> Objective:
    """Trains a bias over each frozen matrix of the blocks, the simplest of all adapters."""

    def split(network, key):
        biases = {
            name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in network["blocks"].items()
        }
        return {"blocks": biases}, network

    def merged(function):
        def with_network(nll_fn, params, *args, frozen, **kwargs):
            network = {
                **frozen,
                "blocks": jax.tree.map(jnp.add, frozen["blocks"], params["blocks"]),
            }
            return function(nll_fn, network, *args, frozen={}, **kwargs)

        return with_network

    return Objective(
        merged(objective.loss),
        merged(objective.bound),
        objective.bound_name,
        split_parameters=split,
    )


@pytest.fixture(scope="module")
def adapted():
    """(abstract state, first state as numpy, state after steps) of adapters on a sharded mesh."""
    model, optimizer = make_model(SMALL), optax.adam(1e-2)
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 4, "tensor": 2})
    objective = with_adapters(masked_diffusion(mask_id=MASK))
    metrics = abstract_metrics(objective, model.abstract, num_rows=B, sequence_length=T)
    split = objective.split_parameters
    abstract = abstract_state(model, optimizer, mesh, metrics=metrics, keep_ema=True, split=split)
    options = {"seed": 0, "num_rows": B, "num_microbatches": 2, "ema_decay": 0.5}
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, abstract, seed=0, split=split)
        first = jax.tree.map(np.asarray, state)
        step = make_train_step(objective, model.nll_fn, optimizer, lambda step: 1e-2, **options)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        for _ in range(3):
            before, state = state, step(state, batch_of())
    return abstract, first, before, state


@pytest.mark.slow
def test_frozen_parameters_stay_and_only_the_trained_ones_have_state(adapted):
    abstract, first, _, state = adapted
    jax.tree.map(np.testing.assert_array_equal, state.frozen, first.frozen)
    assert set(state.params) == set(state.ema) == {"blocks"}
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(abstract.opt_state))
    assert moments == 2 * size + 1
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.params)) > 0
    # the norm that is logged is that of the adapters: far from that of the network
    norm = float(optax.tree.norm(first.frozen))
    assert float(state.metrics["param_norm"][0] / state.metrics["param_norm"][1]) < 0.1 * norm


@pytest.mark.slow
def test_frozen_parameters_are_sharded_like_the_networks_and_donated(adapted):
    abstract, _, before, state = adapted
    embed = state.frozen["embed"]
    assert embed.addressable_shards[0].data.size == embed.size // 8
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.frozen))


def test_a_split_that_is_not_two_dicts_is_refused():
    for split in (lambda network, key: network, lambda network, key: ({}, network)):
        with pytest.raises(UserError, match=r"must return two dicts of arrays, \(params, frozen\)"):
            split_abstract(split, make_model(SMALL).abstract, name="own:x")
    with pytest.raises(UserError, match="does not take"):
        split_abstract(lambda network: (network, {}), make_model(SMALL).abstract, name="own:x")


# ---- fields of a batch


def weighted_rows(**_) -> Objective:
    """Masked diffusion whose rows carry weights of their own, one more field of the batch."""
    ours = masked_diffusion(mask_id=MASK)

    def loss(nll_fn, params, batch, *args, **kwargs):
        def weighted_nll_fn(*arrays):
            scores = nll_fn(*arrays)
            return scores._replace(nll_BT=scores.nll_BT * batch["row_weight"][:, None])

        return ours.loss(weighted_nll_fn, params, batch, *args, **kwargs)

    fields = {**FIELDS, "row_weight": Field("float32", "B")}
    return Objective(loss, ours.bound, "nelbo", batch=fields)


PROVIDED = weighted_rows().batch


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_field_with_one_entry_per_row_is_sharded_split_and_read(parts, num_microbatches):
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 4, "sequence": 2})
    config = config_of(
        objective__name="own:weighted_rows", optimizer__gradient_accumulation=num_microbatches
    )
    nelbo = []
    with jax.set_mesh(mesh):
        recipe = make_recipe(config, Ids(), mesh, provided=PROVIDED)
        compiled = compile_step(recipe, (B, T))
        for factor in (1.0, 2.0):
            weights = factor * np.arange(B, dtype=np.float32)
            batch = sharding.place_batch(
                batch_of(row_weight=weights), list(range(B)), B, recipe.batch_sharding
            )
            assert batch["row_weight"].sharding.shard_shape((B,)) == (B // 4,)
            state = create_state(recipe.model, recipe.optimizer, recipe.abstract, seed=0)
            state, _ = compiled(state, batch)
            nelbo.append(float(state.metrics["nelbo"][0]))
    assert nelbo[1] == pytest.approx(2 * nelbo[0], rel=1e-5)
    assert nelbo[0] > 0


def test_a_field_that_the_data_lack_is_refused_before_compilation(parts):
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 8})
    config = config_of(objective__name="own:weighted_rows")
    with pytest.raises(UserError, match="'own:weighted_rows' needs the batch field 'row_weight'"):
        make_recipe(config, Ids(), mesh, provided=FIELDS)


def no_objective(**_):
    return lambda *args, **kwargs: 0.0


def test_a_function_in_place_of_a_record_is_refused(parts):
    mesh = make_mesh({**dict.fromkeys(AXES, 1), "fsdp": 8})
    with pytest.raises(UserError, match="'own:no_objective' returns a function; it must return a"):
        make_recipe(config_of(objective__name="own:no_objective"), Ids(), mesh)


@pytest.mark.parametrize(
    ("sizes", "dtype", "is_refused"),
    [
        ({"fsdp": 4, "sequence": 2}, "bfloat16", True),
        ({"fsdp": 4, "sequence": 2}, "float32", False),
        ({"fsdp": 8}, "bfloat16", False),
    ],
)
def test_rows_that_cpus_share_are_refused_in_16_bits(sizes, dtype, is_refused):
    mesh, config = make_mesh(sizes), config_of(model__dtype=dtype)
    if is_refused:
        with pytest.raises(UserError, match="sequence=2: XLA cannot.*set model.dtype to float32"):
            make_recipe(config, Ids(), mesh)
    else:
        assert make_recipe(config, Ids(), mesh).dtype == dtype
