"""Presets of TPU flags change the compiled program: what a preset is kept for.

The program is a small one of the train step, compiled by libtpu for a slice that is not here.
"""

import json

import pytest
from support.plans import compile_in_a_process

from llada_jax.cluster.compiler_flags import flags_named

SMALL = """
from llada_jax.config import default_config
def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.batch_size, config.data.sequence_length = 256, 256
    config.model.vocab_size, config.model.num_layers, config.model.d_model = 8192, 2, 2048
    config.model.num_heads = config.model.num_kv_heads = 16
    config.model.head_dim, config.model.d_ff = 128, 6144
    config.model.remat, config.model.attention = "attention", "xla"  # no kernel to compile
    return config
"""


@pytest.mark.parametrize("preset", ["v6e", "tpu7x"])
def test_every_preset_for_sparse_cores_has_the_flags_of_the_one_that_is_compiled(preset):
    flags, compiled = (
        set(flags_named(name)["LIBTPU_INIT_ARGS"].split()) for name in (preset, "v5p")
    )
    assert compiled <= flags


@pytest.mark.slow
def test_sparse_cores_gather_and_scatter(tmp_path):
    """Without the preset none of them is asynchronous, and some are an all-reduce.

    At this level the compiler schedules nothing between start and done. To compile for v6e takes
    three times as long, and docs/log.md has what it makes of the same flags.
    """
    (tmp_path / "small.py").write_text(SMALL)
    words = ("--config", str(tmp_path / "small.py"), "--topology", "v5p-128", "--flags", "v5p")
    done = compile_in_a_process(tmp_path, *words, level="O0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["compiled"]["collectives"]
    for kind in ("all-gather", "reduce-scatter"):
        moved = [c for c in found if c["kind"].startswith(kind)]
        total = sum(c["total_bytes"] for c in moved)
        assert total > 0
        native = [c for c in moved if c["kind"] == kind and c["is_asynchronous"]]
        assert sum(c["total_bytes"] for c in native) > 0.9 * total
