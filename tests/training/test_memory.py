"""The memory of a step, and the remat policy that "auto" stands for, on machines that are not
there.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.plans import estimated

from llada_jax.cluster import hardware
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.config import completed, default_config
from llada_jax.planning.absent_devices import stand_in_tokenizer
from llada_jax.training.memory import AUTO_REMATS, AUTO_SHARE, sharded_bytes
from llada_jax.training.step import make_recipe
from llada_jax.verbs import plan

AUTO = "model.remat=auto"


@pytest.mark.parametrize(
    ("topology", "rows", "remat"),
    [
        ("v5p-128", 256, "dots"),
        ("v5p-128", 1280, "attention"),
        ("64xh100", 1280, "attention"),
        ("64xh100", 2560, "full"),
        ("v5litepod-256", 1024, "attention"),
        ("v5litepod-256", 2048, "full"),
    ],
)
def test_the_less_memory_the_less_is_kept(topology, rows, remat):
    assert estimated(topology, AUTO, f"data.batch_size={rows}")["remat"] == remat


@pytest.mark.parametrize("topology", ["v5p-128", "v6e-256", "64xh100", "64xh200", "64xb200"])
def test_auto_is_the_first_policy_of_which_the_estimate_fits(topology):
    rows = "data.batch_size=1280"
    chosen = estimated(topology, AUTO, rows)
    peaks = {}
    for name in AUTO_REMATS:
        p = estimated(topology, f"model.remat={name}", rows)
        peaks[name] = p["memory"]["peak"] / p["usable_bytes"]
        if name == chosen["remat"]:
            assert p["memory"] == chosen["memory"]
    fits = [name for name in AUTO_REMATS if peaks[name] < AUTO_SHARE]
    assert chosen["remat"] == (fits[0] if fits else "full")


def small_recipe(**data):
    config = default_config()
    config.data.update(batch_size=8, **data)
    config.model.num_layers, config.model.d_model = 1, 32
    config.model.num_heads = config.model.num_kv_heads = 2
    config.model.head_dim, config.model.d_ff = 16, 64
    config.num_steps = 10
    return make_recipe(config, stand_in_tokenizer(512), one_device_mesh())


def test_a_cpu_keeps_the_products():
    recipe = small_recipe(sequence_length=64)
    assert recipe.remat == "dots"


def test_rows_may_be_cut_to_any_length_that_the_kernel_takes():
    """A CPU would choose another kernel for the short rows, but takes them with this one too."""
    recipe = small_recipe(sequence_length=512, length_buckets=(128,))
    assert recipe.attention == "xla_by_head"


def test_the_choice_is_made_for_the_kernel_of_the_run():
    """The reference holds the scores of all positions, so that less of the rest can be kept."""
    words = ("data.batch_size=320", AUTO)
    assert estimated("v5p-128", *words)["remat"] == "dots"
    assert estimated("v5p-128", *words, "model.attention=xla")["remat"] != "dots"


def test_microbatches_and_the_mesh_are_counted():
    rows = "data.batch_size=1280"
    assert estimated("v5p-128", AUTO, rows, "optimizer.gradient_accumulation=5")["remat"] == "dots"


def test_several_microbatches_need_a_second_copy_of_the_gradients():
    one, two = (
        estimated("v5p-128", "data.batch_size=256", f"optimizer.gradient_accumulation={number}")
        for number in (1, 2)
    )
    assert two["memory"]["gradients"] == 2 * one["memory"]["gradients"]


def test_the_largest_shard_of_an_array_is_what_a_device_holds():
    spec = PartitionSpec(("fsdp", "sequence"), None, "tensor")
    place = NamedSharding(one_device_mesh(), spec)
    tree = {"w": jax.ShapeDtypeStruct((9, 3, 5), jnp.bfloat16, sharding=place)}
    shape = {"fsdp": 2, "sequence": 2, "tensor": 2}
    assert sharded_bytes(tree, shape) == 3 * 3 * 3 * 2


# {(GPUs, further knobs): GiB that XLA states for the step with model.remat=none, jax 0.10.2}
MEASURED = {
    ("1xh100", "model.num_layers=17", "data.batch_size=8"): 13.449,
    ("8xh100",): 1.403,
    ("8xh100", "mesh.tensor=4"): 2.901,
    ("8xh100", "model.qk_norm=per_head", "model.attention_bias=qkv"): 1.701,
    ("8xh100", "model.attention=xla"): 2.448,
    ("8xh100", "model.dtype=float32"): 3.573,
    ("8xh100", "mesh.sequence=8", "model.num_heads=9", "model.num_kv_heads=3"): 1.634,
}


@pytest.mark.parametrize("words", MEASURED, ids=" ".join)
def test_where_a_loop_recomputes_nothing_the_estimate_is_near_the_compilers_peak(words):
    config = default_config()
    config.num_steps, config.data.batch_size, config.data.sequence_length = 10, 32, 1024
    config.model.vocab_size, config.model.num_layers, config.model.remat = 1024, 4, "none"
    config.model.d_model, config.model.d_ff, config.model.head_dim = 1024, 3072, 128
    config.model.num_heads, config.model.num_kv_heads = 8, 4
    topology, *overrides = words
    config = completed(config, overrides, values={})
    machines = hardware.machines_named(topology)
    peak = plan.estimate(plan.Asked(config, machines, 1, 1024))["memory"]["peak"]
    assert peak == pytest.approx(MEASURED[words] * 2**30, rel=0.1)
