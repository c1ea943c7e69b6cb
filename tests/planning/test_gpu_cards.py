"""One small network compiled for GPUs of the generations before and after the H100, with the flags
that the docs propose.
"""

import json
import subprocess
import sys

import pytest
from support.required import compiler_environment

CARDS = ("8xa100-80gb", "8xb200")

# In one process, because starting it takes as long as compiling for a card.
COMPILE = """
import json, sys
from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.cluster.hardware import machines_named
from llada_jax.config import default_config
from llada_jax.planning.absent_devices import load_compiler
from llada_jax.verbs.plan import Asked, compile_and_check

config = default_config()
config.num_steps, config.data.batch_size, config.data.sequence_length = 1, 16, 1024
sizes = dict(num_layers=4, d_model=1024, num_heads=8, num_kv_heads=8, head_dim=128, d_ff=4096)
config.model.update(sizes)
load_compiler(machines_named(sys.argv[1]), flags_named("hopper"))
reports = {}
for name in sys.argv[1:]:
    config.data.batch_size = 2 * int(name.partition("x")[0])
    reports[name] = compile_and_check(Asked(config, machines_named(name), 1, 4096))
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict:
    environment = {**compiler_environment("gpu"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *CARDS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("plan"),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_cudnn_attends_on_every_card(reports, card):
    compiled = reports[card]
    assert compiled["fits"]
    assert sorted(compiled["kernels"].values()) == [4, 4]
    assert all("fmha" in kernel for kernel in compiled["kernels"])


@pytest.mark.slow
def test_with_the_preset_products_hide_the_gathers_and_scatters_of_the_layers(reports):
    def hidden(kind: str) -> float:
        found = [c for c in reports["8xb200"]["collectives"] if c["kind"].startswith(kind)]
        moved = sum(c["total_bytes"] for c in found)
        return sum(c["total_bytes"] for c in found if c["is_overlapped"]) / moved

    assert hidden("all-gather") > 0.5
    assert hidden("reduce-scatter") > 0.5
