"""Every choice that the config offers is one that the code takes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import DEFAULT, valid

from llada_jax import config
from llada_jax.errors import UserError
from llada_jax.masks import BIDIRECTIONAL, CAUSAL
from llada_jax.models.attention import IMPLEMENTATIONS, choose
from llada_jax.models.model import compute_dtype, make_model
from llada_jax.models.recomputation import REMAT_POLICIES
from llada_jax.models.transformer import Architecture
from llada_jax.objectives import corruption
from llada_jax.objectives.masked_diffusion import masked_diffusion_loss
from llada_jax.objectives.named import make_objective
from llada_jax.training.optim import OPTIMIZERS, make_optimizer, make_schedule
from llada_jax.training.step import optimizer_knobs
from llada_jax.validation import AUTO, CHOICES


def test_the_choices_of_tables_are_the_keys_of_the_tables():
    assert set(CHOICES["optimizer.name"]) == set(OPTIMIZERS)
    assert set(CHOICES["model.attention"]) == {AUTO, *IMPLEMENTATIONS}
    assert set(CHOICES["model.remat"]) == {AUTO, "none", *REMAT_POLICIES}


def test_every_knob_that_lists_words_in_its_comment_has_those_choices():
    """`# a | b` above a knob in default_config is what CHOICES holds, so that the file that people
    read is right.
    """
    source = Path(config.__file__).read_text()
    listed = {}
    for comment, path in re.findall(r"\n +# (.*\|.*)\n +config\.([\w.]+) = ", source):
        parts = re.split("[:;]", re.sub(r"\([^)]*\)", "", comment))
        (clause,) = (part for part in parts if "|" in part)
        listed[path] = {word.split()[0] for word in clause.split("|")}
    assert set(listed) == set(CHOICES)
    for path, words in listed.items():
        assert words == set(CHOICES[path]) - {AUTO}, path


def schedule_knobs(**changes) -> dict:
    return {**DEFAULT.schedule, "warmup_steps": 0, **changes}


@pytest.mark.parametrize("name", CHOICES["schedule.name"])
@pytest.mark.parametrize("shape", CHOICES["schedule.decay_shape"])
def test_every_schedule_gives_positive_rates(name, shape):
    schedule = make_schedule(
        **schedule_knobs(name=name, decay_shape=shape), num_steps=100, tokens_per_step=1 << 20
    )
    rates = np.array([schedule(step) for step in range(100)])
    assert (rates > 0).all()
    assert rates.max() <= 4e-4 * (1 + 1e-6)


def test_the_decay_shapes_differ():
    rates = [
        make_schedule(
            **schedule_knobs(name="wsd", decay_shape=shape), num_steps=100, tokens_per_step=1
        )(95)
        for shape in CHOICES["schedule.decay_shape"]
    ]
    assert len(set(map(float, rates))) == len(rates)


def test_an_unknown_schedule_or_decay_shape_is_refused_by_make_schedule_too():
    with pytest.raises(UserError, match="schedule 'wds'"):
        make_schedule(**schedule_knobs(name="wds"), num_steps=10, tokens_per_step=1)


class Ids:
    mask_id, bos_id = 3, 1


@pytest.mark.parametrize("name", CHOICES["objective.name"])
def test_every_objective_trains_and_has_a_bound(name):
    knobs = valid(**{"objective.name": name}).objective
    objective = make_objective(Ids(), **knobs)
    assert callable(objective.loss)
    assert callable(objective.bound)
    is_causal = name == "autoregressive"
    assert objective.bound_name == ("nll" if is_causal else "nelbo")
    assert objective.mask == (CAUSAL if is_causal else BIDIRECTIONAL)


@pytest.mark.parametrize("t_sampling", CHOICES["objective.t_sampling"])
@pytest.mark.parametrize("masking", CHOICES["objective.masking"])
@pytest.mark.parametrize("weight", CHOICES["objective.weight"])
def test_every_way_to_corrupt_and_to_weigh_is_taken(t_sampling, masking, weight):
    B, T = 4, 8
    batch = {name: jnp.ones((B, T), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["is_maskable"] = jnp.ones((B, T), bool)

    class Scores:
        nll_BT = None
        is_correct_BT = jnp.zeros((B, T), bool)

    def nll_fn(params, noisy_BT, targets_BT, where_BT, segment_ids_BT, positions_BT):
        scores = Scores()
        scores.nll_BT = where_BT.astype(jnp.float32)  # one nat a masked token
        return scores

    loss_sum, count, metrics = masked_diffusion_loss(
        nll_fn,
        {},
        batch,
        jax.random.key(0),
        jnp.arange(B),
        num_rows=B,
        mask_id=3,
        t_sampling=t_sampling,
        masking=masking,
        weight=weight,
    )
    assert count == B * T
    num_masked = metrics["masked_accuracy"][1]
    assert 0 < num_masked <= B * T
    if weight == "none":
        assert loss_sum == num_masked
    else:
        assert loss_sum == metrics["nelbo"][0]
        assert loss_sum >= num_masked


def test_the_two_ways_to_draw_t_differ_and_a_third_is_no_silent_default():
    rows = jnp.arange(4)
    drawn = [
        corruption.sample_t(jax.random.key(0), rows, num_rows=4, t_sampling=how)
        for how in ("stratified", "iid")
    ]
    assert not np.array_equal(*drawn)
    with pytest.raises(AssertionError, match="antithetic"):
        corruption.sample_t(jax.random.key(0), rows, num_rows=4, t_sampling="antithetic")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_every_optimizer_takes_a_step(name):
    knobs = optimizer_knobs(valid(**{"optimizer.name": name}).optimizer)
    # The paths are the model's own: muon recognises the matrices of the blocks by their names.
    params = make_model(architecture()).init(jax.random.key(0))
    optimizer = make_optimizer(lambda step: 1e-3, **knobs)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        assert update.shape == param.shape
        assert np.isfinite(update).all()
        assert (
            np.asarray(update) < 0
        ).mean() > 0.5  # downhill, but for what the decay of a large weight outweighs


def architecture(**changes) -> Architecture:
    sizes = {
        "vocab_size": 64,
        "num_layers": 1,
        "d_model": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 16,
    }
    return Architecture(**{**sizes, **changes})


def logits(**kwargs) -> np.ndarray:
    changes = {"qk_norm": kwargs.pop("qk_norm", "none")}
    model = make_model(architecture(**changes), **kwargs)
    tokens_BT = jnp.arange(8)[None] % 5
    positions_BT = jnp.arange(8)[None]
    params = model.init(jax.random.key(0))
    return np.asarray(
        jax.jit(model.logits_fn)(params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT),
        np.float32,
    )


@pytest.mark.slow
def test_every_qk_norm_and_remat_policy_computes():
    plain = logits()
    for remat in {*CHOICES["model.remat"]} - {AUTO}:
        np.testing.assert_allclose(logits(remat=remat), plain, atol=1e-5)
    results = [logits(qk_norm=how) for how in CHOICES["model.qk_norm"]]
    assert all(result.shape == plain.shape for result in results)
    assert not np.allclose(results[0], results[1])


def test_every_dtype_is_one_and_auto_depends_on_the_platform():
    for name in CHOICES["model.dtype"]:
        for platform in ("cpu", "gpu", "tpu"):
            dtype = compute_dtype(name, platform)
            expected = ("float32" if platform == "cpu" else "bfloat16") if name == AUTO else name
            assert dtype == jnp.dtype(expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sequence_length", [16, 128, 4096])
def test_auto_attention_is_an_implementation(platform, packed, sequence_length):
    for name in CHOICES["model.dtype"]:
        chosen = choose(
            AUTO,
            platform=platform,
            packed=packed,
            mask=BIDIRECTIONAL,
            sequence_length=sequence_length,
            head_dim=64,
            dtype=compute_dtype(name, platform),
        )
        assert chosen in IMPLEMENTATIONS
