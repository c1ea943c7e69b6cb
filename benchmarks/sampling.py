"""How fast is each mode of the sampler next to the plain loop over the whole canvas, and next to
the published loop of the same model in PyTorch?

    python benchmarks/sampling.py [--size 30m] [--gen-length 128] [--block-length 32] \
        [--batch-size 4] [--repeats 3] [--cores 2]
    python benchmarks/sampling.py --checkpoint CKPT --data DIR --control CKPT --temperature 1

Both libraries run on the first accelerator that JAX finds, in bfloat16, and on a CPU in float32
where there is none.

Every mode is compiled before the first one is timed, and then all modes take turns, so that other
load on the machine affects all of them alike; the median over the turns counts. The plain loop is
the published schedule with one token per pass, which asks the host after every step, as the
published code does. Without a checkpoint the network is untrained: its passes cost what those of a
trained one cost, but a commit rule that waits for confidence finds none, so that the passes per
token mean nothing. Give a checkpoint and the data of its run to measure the rules: the prompts are
then held-out text, and what the control pays, which is an autoregressive model of the same data,
says whether the texts are no worse than those of the plain loop (benchmarks/frontier.py).

PyTorch runs the published loop eagerly: logits of the whole canvas, a softmax over all of them, and
a sort per row. It has the same parameters, and its tokens must agree with those of the plain loop
at temperature 0, so that both compute the same function; in bfloat16 their roundings differ. At
another temperature it draws as the published code does, from float64 noise.

The agreement is the share of tokens that are the plain loop's. The work of the host is measured
with a network that costs next to nothing, for the same prompts and schedule, and given as a share
of a pass of the plain loop; it includes the sampler's own arithmetic, so that it is an upper bound.
On a CPU it is processor time, and on an accelerator, which works next to the host, time.

PyTorch's threads spin while they wait for each other, so that other load slows PyTorch several
times more than JAX: on a machine that is not idle, --cores 1 and the column of processor time
compare fairly.

It needs the dev extra and torch. Prints a Markdown table.
"""

import argparse
import os
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from frontier import held_out, judged_by
from train_step import load_parameters, make_torch_model

import llada_jax
from llada_jax.cluster.sharding import one_device_mesh
from llada_jax.evaluation.sample_quality import is_no_worse, quality
from llada_jax.masks import BIDIRECTIONAL
from llada_jax.models.layers import by_layer
from llada_jax.models.model import compute_dtype, in_compute_dtype
from llada_jax.models.transformer import Architecture
from llada_jax.pretrained import network_for_canvases
from llada_jax.samplers.text import generate_tokens

# (vocabulary, layers, width, heads, feed-forward width); "160m" is the network of
# configs/llada_160m.py with a smaller vocabulary.
SIZES = {
    "2m": (4096, 2, 192, 4, 512),
    "30m": (4096, 8, 512, 8, 1408),
    "160m": (32768, 12, 768, 12, 2048),
}
TORCH, PLAIN = "PyTorch, published loop", "plain loop"
MODES: dict[str, dict[str, Any]] = {
    TORCH: {},
    PLAIN: {"on_step": lambda rows, state: None},
    "one loop per block": {},
    "threshold": {"commit": "threshold=0.9"},
    "factor": {"commit": "factor=1"},
    "frechet": {"commit": "frechet=0.25"},
    "entropy": {"commit": "entropy=0.1"},
    "wino": {"commit": "threshold=0.6", "revise": "wino=0.9"},
    "remdm": {"revise": "remdm-rescale=0.1"},
    "append": {"append": True},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, refresh 8": {"cache": "dual", "refresh": 8},
    "dual cache, refresh 16": {"cache": "dual", "refresh": 16},
    "append, cache": {"append": True, "cache": "dual"},
    "frechet, dual cache": {"commit": "frechet=0.25", "cache": "dual"},
    "frechet, dual cache, refresh 16": {"commit": "frechet=0.25", "cache": "dual", "refresh": 16},
}


def untrained(size: str) -> tuple:
    """Returns (architecture, model, params, ids) of a network that has learnt nothing."""
    vocab_size, num_layers, d_model, num_heads, d_ff = SIZES[size]
    architecture = Architecture(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=d_ff,
    )
    dtype = compute_dtype("auto", jax.default_backend())
    mesh = one_device_mesh()
    model = network_for_canvases(architecture, BIDIRECTIONAL, mesh, dtype=str(dtype))
    ids = {"mask_id": vocab_size - 1, "pad_id": 0, "num_ids": vocab_size - 1}
    params = in_compute_dtype(jax.jit(model.init)(jax.random.key(0)), dtype)
    params = by_layer(params) if model.is_unrolled else params
    return architecture, model, params, ids


def trained(checkpoint: str) -> tuple:
    loaded = llada_jax.load(checkpoint, keep_float32=False)
    ids: dict[str, Any] = {
        "mask_id": loaded.tokenizer.mask_id,
        "pad_id": loaded.tokenizer.pad_id,
    }
    ids["num_ids"] = loaded.tokenizer.vocab_size
    # Every text has the same length, so that the modes do the same work.
    ids["suppress"] = loaded.tokenizer.end_ids
    return loaded.record.architecture, loaded.model, loaded.params, ids


def torch_loop(architecture: Architecture, params: dict, prompts: list, args, ids: dict):
    """Returns a function that samples as the published code does, with the same parameters."""
    import torch

    is_cpu = jax.default_backend() == "cpu"
    device, dtype = ("cpu", torch.float32) if is_cpu else ("cuda", torch.bfloat16)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    width = args.prompt_length + args.gen_length
    net = make_torch_model(vars(architecture) | {"sequence_length": width})
    if isinstance(params["blocks"], tuple):
        stacked = jax.tree.map(lambda *layers: np.stack(layers), *params["blocks"])
        params = {**params, "blocks": stacked}
    flat = jax.tree_util.tree_leaves_with_path(params)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float32)
        for path, leaf in flat
    }
    load_parameters(net, Arrays(arrays))
    # the rotary angles stay in float32, as where the published code computes them
    angles = net.cos_TH, net.sin_TH
    net = net.to(device, dtype)
    net.cos_TH, net.sin_TH = (angle.to(device) for angle in angles)

    @torch.no_grad()
    def sample(steps_per_block: int = args.block_length) -> np.ndarray:
        canvas_BT = torch.full((len(prompts), width), ids["mask_id"], device=device)
        canvas_BT[:, : args.prompt_length] = torch.tensor(prompts, device=device)
        for first in range(args.prompt_length, width, args.block_length):
            stop = first + args.block_length
            for _ in range(steps_per_block):
                is_hidden_BT = canvas_BT == ids["mask_id"]
                logits_BTV = net(canvas_BT)
                p_BTV = torch.softmax(logits_BTV.float(), dim=-1)
                logits_BTV[..., ids["num_ids"] :] = -torch.inf
                logits_BTV[..., [ids["mask_id"], *ids.get("suppress", ())]] = -torch.inf
                if args.temperature:
                    scores_BTV = logits_BTV.to(torch.float64)
                    noise_BTV = (-torch.rand_like(scores_BTV).log()) ** args.temperature
                    logits_BTV = scores_BTV.exp() / noise_BTV
                choices_BT = logits_BTV.argmax(-1)
                p_BT = p_BTV.gather(-1, choices_BT[..., None])[..., 0]
                p_BT[:, stop:] = -torch.inf
                confidence_BT = torch.where(is_hidden_BT, p_BT, -torch.inf)
                for row, confidence_T in enumerate(confidence_BT):
                    place = confidence_T.topk(1).indices
                    canvas_BT[row, place] = choices_BT[row, place]
        return canvas_BT[:, args.prompt_length :].cpu().numpy()

    return sample


class Arrays(dict):
    """Arrays by name, with the names under `files` as numpy.load gives them."""

    @property
    def files(self) -> list[str]:
        return list(self)


def no_logits(params, tokens_BT, segment_ids_BT, positions_BT, start, length):
    """A network that costs next to nothing."""
    scores_V = params["scores"]
    return jnp.broadcast_to(scores_V, (tokens_BT.shape[0], length, scores_V.shape[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", help="of the run, with held-out rows of both lengths together")
    parser.add_argument("--control", help="an autoregressive model, which judges")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--size", choices=SIZES, default="30m", help="without a checkpoint")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, help="use no more than that many")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    if bool(args.checkpoint) != bool(args.data) or (args.control and not args.data):
        parser.error("--checkpoint and --data go together, and --control needs both")
    if PLAIN not in args.modes:
        args.modes = [PLAIN, *args.modes]  # what the others are compared with
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    found = trained(args.checkpoint) if args.checkpoint else untrained(args.size)
    architecture, model, params, ids = found
    if args.data:
        prompts_BT, _, frequency_V = held_out(
            args.data,
            num_prompts=args.batch_size,
            prompt_length=args.prompt_length,
            gen_length=args.gen_length,
            eos_id=llada_jax.load(args.checkpoint).tokenizer.eos_id,
        )
        prompts = prompts_BT.tolist()
    else:
        rng = np.random.default_rng(0)
        highest = ids["num_ids"] // 2
        prompts = rng.integers(1, highest, (args.batch_size, args.prompt_length)).tolist()
    request: dict[str, Any] = {
        "gen_length": args.gen_length,
        "temperature": args.temperature,
        "block_length": args.block_length,
        "batch_size": args.batch_size,
    }
    if TORCH in args.modes:
        published = torch_loop(architecture, params, prompts, args, ids)

    def warm_up(mode: str) -> None:
        """Runs what `sample` runs; a schedule takes one pass per block, from the same program."""
        if mode == TORCH:
            published(steps_per_block=1)
        elif "commit" in MODES[mode]:
            sample(mode)
        else:
            sample(mode, steps=args.gen_length // args.block_length)

    def sample(mode: str, **changes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns seconds and seconds of the processor, tokens, and passes."""
        start = np.array([time.perf_counter(), time.process_time()])
        if mode == TORCH:
            tokens_BT, num_steps_B = published(), np.full(args.batch_size, args.gen_length)
        else:
            tokens_BT, num_steps_B = generate_tokens(
                model.logits_fn,
                params,
                prompts,
                cached_fn=model.cached_fn,
                shadow_fn=model.shadow_fn,
                **request,
                **ids,
                **MODES[mode],
                **changes,
            )
        seconds = np.array([time.perf_counter(), time.process_time()]) - start
        return seconds, tokens_BT, num_steps_B

    is_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter

    def host_seconds(mode: str) -> float:
        """Returns the seconds of a pass that computes no network."""
        start = clock()
        params = {"scores": jnp.arange(8.0)}
        small: dict[str, Any] = {"mask_id": 7, "pad_id": 0}
        small_prompts = np.ones_like(prompts).tolist()
        generate_tokens(no_logits, params, small_prompts, **request, **small, **MODES[mode])
        return (clock() - start) / args.gen_length

    for mode in args.modes:
        warm_up(mode)
    results = {}
    seconds: dict[str, list[np.ndarray]] = {mode: [] for mode in args.modes}
    loops = [mode for mode in (PLAIN, "one loop per block") if mode in args.modes]
    host: dict[str, list[float]] = {mode: [] for mode in loops}
    for mode in loops:
        host_seconds(mode)
    for _ in range(args.repeats):
        for mode in args.modes:
            results[mode] = sample(mode)
            seconds[mode].append(results[mode][0])
        for mode in loops:
            host[mode].append(host_seconds(mode))

    medians = {mode: np.median(seconds[mode], axis=0) for mode in args.modes}
    plain_s, plain_cpu_s = medians[PLAIN]
    print(
        f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"{args.checkpoint or args.size}, {args.batch_size} rows, prompts of "
        f"{args.prompt_length} tokens, {args.gen_length} generated in blocks of "
        f"{args.block_length}; {len(os.sched_getaffinity(0))} cores, medians of {args.repeats}\n"
    )
    columns = ["mode", "tokens/s", "times the plain loop", "in processor time"]
    columns += ["passes per token", "agreement"]
    judged = {}
    if args.control:
        columns += ["bits per byte", "no worse"]
        control = llada_jax.load(args.control)
        judged = {mode: judged_by(control, prompts, results[mode][1]) for mode in args.modes}
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for mode in args.modes:
        median_s, cpu_s = medians[mode]
        _, tokens_BT, num_steps_B = results[mode]
        cells = [
            mode,
            f"{tokens_BT.size / median_s:.1f}",
            f"{plain_s / median_s:.2f}",
            f"{plain_cpu_s / cpu_s:.2f}",
            f"{num_steps_B.mean() / args.gen_length:.3f}",
            f"{(tokens_BT == results[PLAIN][1]).mean():.0%}",
        ]
        if judged:
            is_equal = is_no_worse(judged[mode], judged[PLAIN], frequency_V)
            cells.append(f"{quality(judged[mode], frequency_V).bits_per_byte:.3f}")
            cells.append("yes" if is_equal else "no")
        print("| " + " | ".join(cells) + " |")
    print()
    for mode in loops:
        host_s = statistics.median(host[mode])
        share = host_s * args.gen_length / (plain_cpu_s if is_cpu else plain_s)
        print(f"Host, {mode}: {1e3 * host_s:.2f} ms per pass, {share:.1%} of a plain pass.")


if __name__ == "__main__":
    main()
