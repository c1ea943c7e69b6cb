"""How much memory does `llada-jax export` take, compared with the size of the model?

    python benchmarks/export.py [--widths 512 1024] [--devices 1 8]

The models have the 32 layers and the proportions of LLaDA-8B at a smaller width, with random
weights, and are saved by one device and by eight. Each is exported in a fresh process, and the peak
of its resident memory is compared with what it held after its imports. Prints a Markdown table.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# This runs in its own process, so that the memory for making a model is not measured with the
# export.
SAVE = """
import json, sys
import jax
from llada_jax.checkpoints.record import run_record
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.cluster import sharding
from llada_jax.config import default_config
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.training.state import TrainState
workdir, architecture = sys.argv[1], json.loads(sys.argv[2])
tokenizer = load_tokenizer("bytes")
tokenizer.save(workdir + "/tokenizer")
architecture = Architecture(**architecture)
model = make_model(architecture)
mesh = sharding.make_mesh({"fsdp": -1})
params = jax.jit(model.init, out_shardings=parameter_shardings(model, mesh))(jax.random.key(0))
record = run_record(default_config(), architecture, tokenizer, data=[], step=1, tokens=0)
saved = Checkpoints(workdir)
saved.save(TrainState(jax.numpy.int32(1), params, (), {}, {}), record)
saved.close()
"""
EXPORT = """
import json, resource, sys
import jax
from llada_jax.verbs import export
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
jax.devices()
before = peak()
export.main(sys.argv[1:])
print(json.dumps([before, peak()]), file=sys.stderr)
"""


def architecture(width: int) -> dict:
    """Returns the architecture of LLaDA-8B at another width.

    Heads have width 128, the feed-forward has three times the width of the model, and the 126,464
    rows of the vocabulary shrink in proportion.
    """
    from llada_jax.models.transformer import Architecture

    heads = width // 128
    a = Architecture(
        vocab_size=126_464 * width // 4096,
        num_layers=32,
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        d_ff=3 * width,
    )
    return dataclasses.asdict(a)


def measure(width: int, num_devices: int, scratch: Path) -> dict[str, float]:
    """Returns the bytes and the seconds of one export."""
    a, workdir, out = architecture(width), scratch / "run", scratch / "out"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", SAVE, workdir, json.dumps(a)],
        check=True,
        env={**environment, "JAX_NUM_CPU_DEVICES": str(num_devices)},
    )
    began = time.perf_counter()
    words = ["--checkpoint", str(workdir), "--output", str(out), "--shard-size", "100MB"]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *words],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    before, peak = json.loads(done.stderr.splitlines()[-1])
    largest = 4 * max(a["num_layers"] * a["d_model"] * a["d_ff"], a["vocab_size"] * a["d_model"])
    per_layer = a["d_model"] * (4 * a["num_heads"] * a["head_dim"] + 3 * a["d_ff"] + 2)
    model = 4 * (a["num_layers"] * per_layer + a["d_model"] * (2 * a["vocab_size"] + 1))
    return {
        "model": model,
        "largest": largest,
        "before": before,
        "peak": peak,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        default=[1, 8],
        help="numbers of devices that save the model",
    )
    arguments = parser.parse_args()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    print(f"Machine: {names[0] if names else 'unknown processor'}, {os.cpu_count()} cores.\n")
    columns = [
        "width",
        "saved by devices",
        "model, float32",
        "largest stacked parameter",
        "after imports",
        "peak",
    ]
    columns += ["added by the export", "in largest parameters", "in models", "time"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for width, num_devices in itertools.product(arguments.widths, arguments.devices):
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(width, num_devices, Path(scratch))
        sizes = {
            name: f"{found[name] / 1e6:,.0f} MB" for name in ("model", "largest", "before", "peak")
        }
        added = found["peak"] - found["before"]
        cells = [f"{width:,}", str(num_devices), *sizes.values(), f"{added / 1e6:,.0f} MB"]
        cells += [
            f"{added / found['largest']:.1f}",
            f"{added / found['model']:.0%}",
            f"{found['seconds']:.0f} s",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
