"""How fast is each mode of the sampler next to the plain loop over the whole canvas?

    python benchmarks/sampling.py [--checkpoint CKPT] [--gen-length 128] [--block-length 32] \
        [--batch-size 4] [--repeats 3]

Every mode samples the same prompts once to compile, and then all modes take turns, so that other
load on the machine affects all of them alike; the median over the turns counts. The plain loop is
the published schedule with one token per pass, which asks the host after every step, as the
published code does. Without a checkpoint the network is untrained and 8 layers wide of 512: its
passes cost what those of a trained one cost, but a commit rule that waits for confidence finds
none, so that the passes per token mean nothing. Give a checkpoint to measure the rules.

The agreement is the share of tokens that are the plain loop's. It needs the dev extra. Prints a
Markdown table.
"""

import argparse
import platform
import statistics
import time

import jax
import numpy as np

from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture
from llada_jax.samplers.text import generate_tokens

MODES = {
    "plain loop": {"on_step": lambda rows, state: None},
    "one loop per block": {},
    "threshold": {"commit": "threshold=0.9"},
    "factor": {"commit": "factor=1"},
    "frechet": {"commit": "frechet=0.25"},
    "entropy": {"commit": "entropy=0.1"},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, refresh 8": {"cache": "dual", "refresh": 8},
    "append": {"append": True},
    "append, cache": {"append": True, "cache": "dual"},
    "frechet, dual cache": {"commit": "frechet=0.25", "cache": "dual"},
}


def untrained() -> tuple:
    """Returns (model, params, ids, prompts) of a network of 30 million parameters."""
    architecture = Architecture(
        vocab_size=4096,
        num_layers=8,
        d_model=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        d_ff=1408,
    )
    model = make_model(architecture)
    ids = {"mask_id": 4095, "pad_id": 0}
    return model, model.init(jax.random.key(0)), ids


def trained(checkpoint: str) -> tuple:
    import llada_jax

    loaded = llada_jax.load(checkpoint)
    ids = {"mask_id": loaded.tokenizer.mask_id, "pad_id": loaded.tokenizer.pad_id}
    return loaded.model, loaded.params, ids | {"num_ids": loaded.tokenizer.vocab_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    model, params, ids = trained(args.checkpoint) if args.checkpoint else untrained()
    rng = np.random.default_rng(0)
    top = ids.get("num_ids", 4000)
    prompts = rng.integers(1, top // 2, (args.batch_size, args.prompt_length)).tolist()

    def sample(mode: str) -> tuple[float, np.ndarray, np.ndarray]:
        start = time.perf_counter()
        tokens_BT, num_steps_B = generate_tokens(
            model.logits_fn,
            params,
            prompts,
            gen_length=args.gen_length,
            block_length=args.block_length,
            batch_size=args.batch_size,
            cache_fns=model.cache_fns,
            **ids,
            **MODES[mode],
        )
        return time.perf_counter() - start, tokens_BT, num_steps_B

    results = {mode: sample(mode) for mode in args.modes}
    seconds: dict[str, list[float]] = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            seconds[mode].append(sample(mode)[0])
    first = args.modes[0]
    plain_s = statistics.median(seconds[first])
    print(
        f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}; "
        f"{args.batch_size} rows, prompts of {args.prompt_length} tokens, {args.gen_length} "
        f"generated in blocks of {args.block_length}\n"
    )
    print(f"| mode | tokens/s | times {first} | passes per token | agreement |")
    print("|---|---|---|---|---|")
    for mode in args.modes:
        median_s = statistics.median(seconds[mode])
        _, tokens_BT, num_steps_B = results[mode]
        agreement = (tokens_BT == results[first][1]).mean()
        print(
            f"| {mode} | {tokens_BT.size / median_s:.0f} | {plain_s / median_s:.2f} | "
            f"{num_steps_B.mean() / args.gen_length:.3f} | {agreement:.0%} |"
        )


if __name__ == "__main__":
    main()
