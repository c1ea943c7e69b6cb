"""Does a model fit the memory of machines that you have not rented yet while it is sampled?

    python benchmarks/sampler_memory.py --config configs/llada_8b.py --topology v5e-8
    python benchmarks/sampler_memory.py --config configs/llada_8b.py --topology 1xh100

Compiles the very program that denoises a block (llada_jax.samplers.step.denoise_block) for absent
devices, with the parameters split over all of them and their matrices in bfloat16, and prints what
the compiler says about the memory of one device. The whole canvas has --width tokens, prompt and
generation together.

Needs libtpu (the extra tpu) or JAX's plugin for CUDA (plan-gpu), and no device. Prints a line of
JSON.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from llada_jax.cluster import hardware
from llada_jax.config import load_config
from llada_jax.models.attention import IN_PIECES
from llada_jax.models.model import make_model
from llada_jax.planning.absent_devices import absent_mesh, load_compiler, stand_in_tokenizer
from llada_jax.planning.sampler_program import kept_parameters, traced_block
from llada_jax.training.step import architecture_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--topology", required=True, metavar="NAME", help="as of `llada-jax plan`")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--gen-length", type=int, default=512)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--cache", default="none", choices=("none", "prefix", "dual"))
    args = parser.parse_args()
    machines = hardware.machines_named(args.topology)
    load_compiler(machines, {})
    mesh = absent_mesh({"fsdp": -1}, machines, 1)
    config = load_config(args.config, [])
    model = make_model(
        architecture_of(config.model, stand_in_tokenizer(config.model.vocab_size)),
        dtype=jnp.bfloat16,
        attention=IN_PIECES,
    )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = traced_block(
            model,
            kept_parameters(model, mesh, jnp.bfloat16),
            num_rows=args.batch_size,
            width=args.width,
            gen_length=args.gen_length,
            block_length=args.block_length,
            cache=args.cache,
            mesh=mesh,
            is_stochastic=True,
        )
        memory = traced.lower().compile().memory_analysis()
    found = {
        **vars(args),
        "devices": machines.num_devices,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "usable_bytes": machines.accelerator.usable_bytes_per_device,
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
