"""The dtype in which devices add up gradients: in the partitioned program, and in the sums."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.cluster import sharding
from llada_jax.config import default_config
from llada_jax.models.model import abstract_parameters, make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.planning.absent_devices import stand_in_tokenizer
from llada_jax.training.step import make_recipe

B, T = 16, 64
A = Architecture(
    vocab_size=1030,
    num_layers=2,
    d_model=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    qk_norm="per_head",
    attention_bias="qkvo",
)
MESHES = {"fsdp": {"fsdp": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}
TOKENS = np.random.default_rng(0).integers(4, 1000, (B, T))


def nll_sum(model, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    return model.nll_fn(
        params, tokens_BT, tokens_BT, tokens_BT % 2 > 0, None, positions_BT
    ).nll_BT.sum()


def network(gradient_dtype):
    # the head in several pieces, as in training
    return make_model(
        A, dtype=jnp.bfloat16, gradient_dtype=gradient_dtype, nll_chunk=16, remat="attention"
    )


def lowered(gradient_dtype, sizes: dict):
    """Returns the gradient of the sum of a batch's loss, lowered for a mesh of these sizes."""
    mesh, model = sharding.make_mesh(sizes), network(gradient_dtype)
    places = parameter_shardings(model, mesh)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(functools.partial(nll_sum, model)), out_shardings=places)
        return gradient.lower(abstract_parameters(model, mesh), tokens)


# ---- the partitioned programs


def collectives(gradient_dtype, sizes: dict, directory: str) -> dict[str, dict[str, int]]:
    """Returns {opcode: {type: how often}} right after partitioning: the compiler of CPUs makes
    float32 of all bfloat16 later, and that of TPUs does not.
    """
    lowered(gradient_dtype, sizes).compile(
        {"xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd", "xla_dump_emitter_re": "none"}
    )
    (file,) = Path(directory).glob("*after_spmd-partitioning*")
    found = {"all-reduce": {}, "all-gather": {}}
    for kind, opcode in re.findall(r" = (\w+\[[\d,]*\])\S* ([a-z-]+)\(", file.read_text()):
        if opcode in found:
            found[opcode][kind] = found[opcode].get(kind, 0) + 1
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict:
    """{name of MESHES: collectives with (bfloat16, float32) sums}.

    In a process without the compilation cache, from which a program comes without its passes.
    """
    directory = tmp_path_factory.mktemp("programs")
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_matrices_are_summed_in_the_dtype_of_the_knob_and_all_else_in_float32(programs):
    narrow, wide = (set(program["all-reduce"]) for program in programs["fsdp"])
    # the last is a piece of the head
    matrices = {"[64,32]", "[32,64]", "[64,96]", "[96,64]", "[64,264]"}
    assert {kind for kind in narrow if "bf16" in kind} == {"bf16" + shape for shape in matrices}
    assert {kind for kind in wide if "bf16" in kind} == set()
    assert {"f32" + shape for shape in matrices} <= wide
    # norms and the bias of the output are [64], norms of queries and keys [16], other biases [2,16]
    assert {"f32[64]", "f32[16]", "f32[2,16]"} <= narrow & wide


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_dtype_of_the_sums_changes_no_gather_and_no_number_of_sums(programs, name):
    narrow, wide = programs[name]
    assert narrow["all-gather"] == wide["all-gather"] != {}
    assert sum(narrow["all-reduce"].values()) == sum(wide["all-reduce"].values()) > 0
    # what is still bfloat16 with tensor=2 are activations, [4 rows * 64 positions, 64]
    left = {kind for kind in wide["all-reduce"] if "bf16" in kind}
    assert left == ({"bf16[256,64]"} if name == "all" else set())


# ---- the sums


@pytest.mark.slow
def test_a_float32_sum_over_devices_is_that_of_float64_and_a_bfloat16_one_is_rounded():
    # On some CPUs the compiler leaves out roundings to bfloat16 between two operations, and others
    # of them in a partitioned program than in that of one device.
    options = {"xla_allow_excess_precision": False}
    exact = network(jnp.float32)
    params = exact.init(jax.random.key(0))
    part = jax.jit(jax.grad(functools.partial(nll_sum, exact)), compiler_options=options)
    parts = [part(params, jnp.int32(TOKENS[row : row + 2])) for row in range(0, B, 2)]
    expected = jax.tree.map(lambda *g: sum(np.asarray(one, np.float64) for one in g), *parts)

    def summed(gradient_dtype):
        program = lowered(gradient_dtype, MESHES["fsdp"]).compile(options)
        return program(*jax.device_put((params, jnp.int32(TOKENS)), program.input_shardings[0]))

    wide, narrow = summed(jnp.float32), summed(None)

    def error(found, *path):
        found, exact = (functools.reduce(dict.get, path, tree) for tree in (found, expected))
        return np.linalg.norm(np.float64(found) - exact) / np.linalg.norm(exact)

    for name in ("q", "k", "v", "attn_out", "ff_gate", "ff_up", "ff_out"):
        assert error(wide, "blocks", name) < 1e-5
        assert 1e-3 < error(narrow, "blocks", name) < 5e-3
        del wide["blocks"][name], narrow["blocks"][name]
    assert error(wide, "lm_head") < 1e-5
    assert 1e-3 < error(narrow, "lm_head") < 5e-3
    del wide["lm_head"], narrow["lm_head"]
    # norms, biases and the embedding do not depend on the knob
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


@pytest.mark.parametrize(("knob", "dtype"), [("compute", "bf16"), ("float32", "f32")])
def test_the_knob_decides_the_dtype_of_a_matrix_gradient_on_each_device(knob, dtype):
    config = default_config()
    config.num_steps = 1
    config.data.batch_size, config.data.sequence_length = B, T
    for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        config.model[name] = getattr(A, name)
    config.model.dtype, config.optimizer.gradient_dtype = "bfloat16", knob
    recipe = make_recipe(config, stand_in_tokenizer(1030), sharding.one_device_mesh())
    assert recipe.gradient_dtype == {"bf16": jnp.bfloat16, "f32": jnp.float32}[dtype]
    traced = jax.make_jaxpr(jax.grad(functools.partial(nll_sum, recipe.model)))(
        recipe.model.abstract, TOKENS
    )
    # the gradient of a feed-forward matrix, in either order of its dims
    products = set(re.findall(r":(\w+)\[(?:64,96|96,64)\] = dot_general", str(traced)))
    assert products == {dtype}


if __name__ == "__main__":
    programs_by_mesh = {}
    for mesh_name, mesh_sizes in MESHES.items():
        programs_by_mesh[mesh_name] = [
            collectives(dtype, mesh_sizes, f"{sys.argv[1]}/{mesh_name}-{number}")
            for number, dtype in enumerate((None, jnp.float32))
        ]
    print(json.dumps(programs_by_mesh))
