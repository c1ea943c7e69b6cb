"""Does a model fit the memory of machines that you have not rented yet while it is sampled or
scored?

    python benchmarks/inference_memory.py --config configs/llada_8b.py --topology v5e-8
    python benchmarks/inference_memory.py --config configs/llada_8b.py --topology 1xh100
    python benchmarks/inference_memory.py --config configs/llada_8b.py --topology 1xh100 \\
        --program records

Compiles the very program that denoises a block (llada_jax.samplers.step.denoise_block), the one of
`evaluate --data` that scores a batch of records (llada_jax.evaluation.likelihood.batch_sums), or
the one that scores answers (llada_jax.evaluation.answer_rows.nll_of_answers), for absent devices,
with the parameters split over all of them as --mesh says and their matrices in bfloat16, and prints
what the compiler says about the memory of one device, what the devices exchange, and what a loop
copies. Rows have --width tokens: prompt and generation
together, a record, or prompt and answer. --gen-length is the length of the answer too.

Needs libtpu (the extra tpu) or JAX's plugin for CUDA (plan-gpu), and no device. Prints a line of
JSON.
"""

import argparse
import json
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llada_jax import pretrained
from llada_jax.checkpoints.record import RunRecord, TokenizerIdentity
from llada_jax.cluster import hardware
from llada_jax.cluster.sharding import parse_mesh
from llada_jax.config import load_config
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.evaluation.splits import rows_at_a_time
from llada_jax.loaded_model import Pretrained
from llada_jax.objectives.named import make_objective
from llada_jax.planning.absent_devices import absent_mesh, load_compiler, stand_in_tokenizer
from llada_jax.planning.collectives import collectives
from llada_jax.planning.compiled_program import copies_in_loops, kernels
from llada_jax.planning.evaluation_program import traced_answers, traced_bound
from llada_jax.planning.sampler_program import kept_parameters, traced_block
from llada_jax.training.step import architecture_of
from llada_jax.verbs.evaluate import make_parser

DTYPE = "bfloat16"


def loaded_on(mesh: Mesh, config: Any) -> Pretrained:
    """Returns what `load` would of a checkpoint of the config, with shapes for parameters."""
    tokenizer = stand_in_tokenizer(config.model.vocab_size)
    record = RunRecord(
        config.to_dict(),
        architecture_of(config.model, tokenizer),
        TokenizerIdentity("bytes", tokenizer.vocab_size, ""),
    )
    model = pretrained.network_for_canvases(record.architecture, record.mask, mesh, dtype=DTYPE)
    params = kept_parameters(model, mesh, jnp.bfloat16)
    run, words = record.to_json(), cast(Tokenizer, tokenizer)
    return Pretrained(words, run["config"], params, 0, model, run, mesh)


def traced(loaded: Pretrained, args: argparse.Namespace) -> Any:
    """Returns the program that was asked for, which is not compiled yet."""
    if args.program == "sample":
        return traced_block(
            loaded.model,
            loaded.params,
            num_rows=args.batch_size,
            width=args.width,
            gen_length=args.gen_length,
            block_length=args.block_length,
            cache=args.cache,
            mesh=loaded.mesh,
            is_stochastic=True,
        )
    num_rows = rows_at_a_time(args.batch_size, args.batch_size, loaded.mesh)
    if args.program == "answers":
        return traced_answers(
            loaded.model,
            loaded.params,
            num_rows=num_rows,
            before=args.width - args.gen_length,
            answer=args.gen_length,
            mesh=loaded.mesh,
        )
    packed = not loaded.record.knob("data.attend_across_documents")
    return traced_bound(
        pretrained.network_for_rows(loaded, args.width, dtype=DTYPE, packed=packed),
        loaded.params,
        make_objective(loaded.tokenizer, **loaded.record.knob("objective")),
        num_rows=num_rows,
        sequence_length=args.width,
        mesh=loaded.mesh,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--topology", required=True, metavar="NAME", help="as of `llada-jax plan`")
    parser.add_argument("--mesh", default="fsdp=-1", metavar="AXES", help="as of `sample`")
    parser.add_argument("--program", default="sample", choices=("sample", "records", "answers"))
    parser.add_argument("--batch-size", type=int, help="4 of `sample`, else that of `evaluate`")
    parser.add_argument("--width", type=int, help="1024 of `sample`, else the rows of the config")
    parser.add_argument("--gen-length", type=int, default=512)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--cache", default="none", choices=("none", "prefix", "dual"))
    args = parser.parse_args()
    config = load_config(args.config, [])
    is_sampled = args.program == "sample"
    if args.batch_size is None:
        args.batch_size = 4 if is_sampled else make_parser().get_default("batch_size")
    if args.width is None:
        args.width = 1024 if is_sampled else config.data.sequence_length
    machines = hardware.machines_named(args.topology)
    load_compiler(machines, {})
    loaded = loaded_on(absent_mesh(parse_mesh(args.mesh), machines, 1), config)
    start = time.perf_counter()
    with jax.set_mesh(loaded.mesh):
        compiled = traced(loaded, args).lower().compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    found = {
        **vars(args),
        "devices": machines.num_devices,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "usable_bytes": machines.accelerator.usable_bytes_per_device,
        "kernels": kernels(text),
        "collective_bytes": sum(
            moved.total_bytes
            for moved in collectives(
                text, devices_per_slice=machines.num_devices, shape=dict(loaded.mesh.shape)
            )
        ),
        "copied_in_loops_bytes": copies_in_loops(text).total_bytes,
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
