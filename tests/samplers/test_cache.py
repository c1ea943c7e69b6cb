"""Caches of keys and values: exact where refreshed, and what they hold where they are not."""

import jax
import numpy as np
import pytest

from llada_jax.cluster.sharding import make_mesh
from llada_jax.errors import UserError
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.samplers import denoise
from llada_jax.samplers.text import generate_tokens

V, MASK, PAD, EOS = 64, 63, 0, 62
REQUEST = {"mask_id": MASK, "pad_id": PAD, "gen_length": 12, "block_length": 4}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], []]


def small_model(**changes):
    shape = dict(vocab_size=V, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8)
    model = make_model(Architecture(**shape, d_ff=64, **changes))
    return model, model.init(jax.random.key(5))


@pytest.fixture(scope="module")
def network():
    return small_model()


def sample(network, **changes):
    model, params = network
    return generate_tokens(
        model.logits_fn, params, PROMPTS, cached_fn=model.cached_fn, **(REQUEST | changes)
    )


def make_one_layer():
    shape = dict(vocab_size=V, num_layers=1, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8)
    model = make_model(Architecture(**shape, d_ff=64))
    return model, model.init(jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("prefix", {}),
        ("dual", {"append": True}),
        ("dual", {"cfg_scale": 1.0, "temperature": 1.0}),
        ("prefix", {"commit": "threshold=0.05", "eos_id": EOS}),
        ("dual", {"lookahead": 4}),
        ("dual", {"revise": "remdm-cap=0.4", "temperature": 1.0}),
    ],
    ids=str,
)
def test_a_refresh_in_every_step_equals_no_cache(network, cache, options):
    expected_BT, expected_B = sample(network, **options)
    tokens_BT, num_steps_B = sample(network, cache=cache, refresh=1, **options)
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    np.testing.assert_array_equal(num_steps_B, expected_B)


@pytest.mark.slow
def test_an_interval_is_between_a_refresh_in_every_step_and_one_per_block(network):
    """Otherwise it could be taken for either."""
    tokens = [sample(network, cache="dual", refresh=refresh)[0].tolist() for refresh in (0, 1, 2)]
    assert tokens[2] not in tokens[:2]


@pytest.mark.slow
def test_one_step_per_block_never_reads_a_stale_cache(network):
    expected_BT, _ = sample(network, steps=3)
    tokens_BT, _ = sample(network, steps=3, cache="dual")
    np.testing.assert_array_equal(tokens_BT, expected_BT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "prefix", "refresh": 3, "temperature": 1.0},
        {"cache": "dual", "refresh": 3, "temperature": 1.0},
        # Rows that need different numbers of passes refresh in the same ones.
        {"cache": "dual", "refresh": 2, "commit": "frechet=0.1", "eos_id": EOS},
        {"cache": "dual", "refresh": 3, "revise": "remdm-cap=0.4", "temperature": 1.0},
    ],
    ids=str,
)
def test_any_row_alone_is_the_same_row_in_any_batch(network, options):
    together_BT, together_B = sample(network, **options)
    single_BT, single_B = sample(network, batch_size=1, **options)
    np.testing.assert_array_equal(together_BT, single_BT)
    np.testing.assert_array_equal(together_B, single_B)


@pytest.mark.slow
def test_one_layer_needs_no_refresh_of_what_does_not_change():
    """Keys of one layer depend on their own token, and with a prefix cache no token in front of
    the block changes: the approximation is exact.
    """
    network = make_one_layer()
    expected_BT, _ = sample(network)
    tokens_BT, _ = sample(network, cache="prefix")
    np.testing.assert_array_equal(tokens_BT, expected_BT)


@pytest.mark.slow
def test_steps_that_are_shown_one_by_one_share_the_cache(network):
    expected_BT, _ = sample(network, cache="dual", refresh=3)
    steps = []
    tokens_BT, _ = sample(
        network, cache="dual", refresh=3, on_step=lambda rows, state: steps.append(state.step)
    )
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    assert steps == list(range(1, 13))


@pytest.fixture
def programs(monkeypatch):
    """A list that grows with every block or step by the part of the cache that a device is given,
    the part of the cache that it hands out, and the compiled program.
    """
    run, seen = denoise.denoise_block, []

    def parts(cache):
        return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache)]

    def watched(network, state, cache, *others, program):
        compiled = run.lower(network, state, cache, *others, program=program).compile()
        given = parts(cache)
        result = run(network, state, cache, *others, program=program)
        seen.append((given, parts(result[1]), compiled))
        return result

    monkeypatch.setattr(denoise, "denoise_block", watched)
    return seen


def sample_on_a_mesh(network, **changes):
    """Four rows on four devices, of which each has half of the rows and one of two heads."""
    model, params = network
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    return generate_tokens(
        model.logits_fn,
        jax.device_put(params, parameter_shardings(model, mesh)),
        [*PROMPTS, [10]],
        cached_fn=model.cached_fn,
        **(REQUEST | changes),
    )


# layers, rows, columns, key/value heads, and the size of a head
WHOLE, PART = (2, 4, 44, 2, 8), (2, 2, 44, 1, 8)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_no_device_of_a_mesh_has_the_whole_cache(network, programs, cache):
    sample_on_a_mesh(network, cache=cache)
    assert len(programs) == 3, "one for each block"
    for given, handed_out, compiled in programs:
        assert given == handed_out == [], "the cache of a block ends with it"
        # what the partitioner has made of it, in the shapes of one device
        text = compiled.as_text()
        assert f"f32[{','.join(map(str, PART))}]" in text
        assert f"f32[{','.join(map(str, WHOLE))}]" not in text


def test_a_cache_that_is_kept_between_steps_is_split_from_the_first_one_on(network, programs):
    sample_on_a_mesh(network, cache="dual", on_step=lambda rows, state: None)
    assert [given for given, _, _ in programs] == [[], *[[PART, PART]] * 11]
    assert [handed_out for _, handed_out, _ in programs] == [[PART, PART]] * 12
    assert f"f32[{','.join(map(str, WHOLE))}]" not in programs[0][-1].as_text()


def test_a_cache_that_is_kept_between_steps_is_updated_in_place(network, programs):
    sample(network, cache="dual", on_step=lambda rows, state: None)
    shape = (2, 3, 44, 2, 8)
    for given, handed_out, compiled in programs:
        assert given == handed_out == [shape, shape]
        assert compiled.memory_analysis().alias_size_in_bytes == 2 * 4 * np.prod(shape)


def test_a_shifted_output_has_no_cache():
    network = small_model(output_shift=True)
    with pytest.raises(UserError, match="use cache=none"):
        sample(network, cache="dual")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cache": "prefx"}, "Did you mean 'prefix'?"),
        ({"cache": "dual", "refresh": -1}, "refresh=-1 must not be negative"),
        ({"refresh": 4}, "refresh=4 is about a cache, and there is none"),
    ],
)
def test_impossible_caches_are_refused(network, changes, sentence):
    with pytest.raises(UserError) as error:
        sample(network, **changes)
    assert sentence in str(error.value)
