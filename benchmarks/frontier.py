"""The frontier of speed and quality: how few passes of the network does a token need, by each rule,
cache and refresh interval, before the samples get worse?

    make demo
    llada-jax train --config configs/tiny.py --workdir runs/tiny/control \
        --config.objective.name=autoregressive --config.objective.masking=bernoulli \
        --config.objective.weight=1/p --config.objective.t_sampling=stratified \
        --config.samples.every_steps=0
    python benchmarks/frontier.py --checkpoint runs/tiny/run --control runs/tiny/control \
        --data runs/tiny/data --output runs/tiny/report
    llada-jax evaluate --checkpoint runs/tiny/run --data runs/tiny/data --report runs/tiny/report

Held-out rows are cut in two, the model continues the first parts, and the separately trained
autoregressive control says how many bits per byte the continuations cost after their prompts. Next
to that stand the share of repeated phrases and the distance of the token frequencies from those of
all held-out text. The real continuations and those of the control itself are measured alike.

Passes are those that a text would need alone. A pass with a cache computes fewer columns, so that
the columns computed per token are the second measure of cost; the first pass of a block, and every
one that refreshes the cache, computes all of them. The best of N texts costs the passes of all N,
and those that score them.

"No worse" means that none of the three measures is above that of one token per pass by more than
two standard errors, from a bootstrap over the prompts. Writes frontier.json, which `evaluate
--report` shows, and frontier.md into the output directory after every setting.
"""

import argparse
import functools
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import llada_jax
from llada_jax.data.records import Records, read_dataset
from llada_jax.errors import UserError
from llada_jax.evaluation.sample_quality import Samples, best_of, difference, is_no_worse, quality
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.text import decode_after, generate_tokens

REFERENCE = "schedule, 1 token per pass"


def settings_of(gen_length: int, block_length: int) -> dict[str, dict[str, dict]]:
    """Returns {family: {name: settings of the sampler}}; the first one of all is the reference.

    "best_of" among the settings is how many texts are sampled, of which the most likely is kept.
    """
    num_blocks = gen_length // block_length
    shares = [n for n in (1, 2, 4, 8, 16) if block_length % n == 0]

    def steps(share: int) -> dict:
        return {"steps": num_blocks * block_length // share}

    def name(share: int) -> str:
        return f"schedule, {share} token{'s' if share > 1 else ''} per pass"

    def rules(name: str, *amounts: float) -> dict[str, dict]:
        return {f"{name}={amount:g}": {"commit": f"{name}={amount:g}"} for amount in amounts}

    def caches(kind: str, **rule: str) -> dict[str, dict]:
        name = ", ".join([*rule.values(), kind])
        # refresh=1 equals no cache, which the tests show.
        return {
            f"{name}, refresh 4": {"cache": kind, "refresh": 4, **rule},
            f"{name}, once per block": {"cache": kind, **rule},
        }

    return {
        "schedule": {name(share): steps(share) for share in shares},
        "random order": {
            f"random, {share} per pass": {"remasking": "random", **steps(share)}
            for share in shares[:3:2]
        },
        "threshold": rules("threshold", 0.9, 0.6, 0.3),
        "factor": rules("factor", 1, 2, 3),
        "frechet": rules("frechet", 0.25, 0),
        "entropy": rules("entropy", 0.1, 1, 2, 4),
        "wino": {"threshold=0.3, wino=0.5": {"commit": "threshold=0.3", "revise": "wino=0.5"}},
        "other orders": {
            f"{order}, 1 per pass": {"remasking": order, **steps(1)}
            for order in ("margin", "entropy")
        },
        "remdm": {
            f"{rule}, {share} per pass": {"revise": rule, **steps(share)}
            for rule in ("remdm-rescale=0.1", "remdm-cap=0.02", "remdm-loop=0.02")
            for share in shares[:2]
        },
        "lookahead": {
            "append": {"append": True, **steps(1)},
            f"lookahead {block_length}": {"lookahead": block_length, **steps(1)},
            "append, dual, once per block": {"append": True, "cache": "dual", **steps(1)},
        },
        "prefix cache": caches("prefix"),
        "dual cache": caches("dual"),
        "entropy and cache": caches("dual", commit="entropy=2"),
        "best of": {
            f"best of {num}, {share} per pass": {"best_of": num, **steps(share)}
            for share in shares[:2]
            for num in (2, 4, 8)
        },
    }


class Drawn(NamedTuple):
    """A continuation of every prompt, and what it has cost: int [B] each, of the whole text."""

    samples: Samples
    passes_B: np.ndarray
    columns_B: np.ndarray


class Cost:
    """Counts passes and columns of each row while a request is sampled; give `on_step` to it."""

    def __init__(self, num_rows: int, width: int, gen_length: int, block_length: int):
        self.width, self.gen_length, self.block_length = width, gen_length, block_length
        self.passes_B = np.zeros(num_rows, int)
        self.columns_B = np.zeros(num_rows, int)
        self.step_in_block_B = np.zeros(num_rows, int)
        self.block = 0
        self.cache, self.refresh = "none", 0

    def on_step(self, rows: range, state) -> None:
        if state.block != self.block:
            self.block, self.step_in_block_B[:] = state.block, 0
        # A row takes part in a pass while it has something to reveal, and then it reveals some.
        number_B = np.asarray(state.num_steps_B)[: len(rows)]
        is_active_B = number_B > self.passes_B[rows.start : rows.stop]
        window = self.block_length
        if self.cache == "prefix":
            window = self.gen_length - (state.block - 1) * self.block_length
        for row in np.flatnonzero(is_active_B) + rows.start:
            step = self.step_in_block_B[row]
            is_full = self.cache == "none" or step == 0
            is_full = is_full or (self.refresh > 0 and step % self.refresh == 0)
            self.columns_B[row] += self.width if is_full else window
            self.step_in_block_B[row] += 1
            self.passes_B[row] += 1


def held_out(data: str, *, num_prompts: int, prompt_length: int, gen_length: int, eos_id: int):
    """Returns prompts and their real continuations, int [B, T] each, and the frequencies of the
    tokens of all held-out rows.
    """
    info = read_dataset(data)
    length = prompt_length + gen_length
    rows = Records(info, split="heldout")
    found = []
    counts_V = np.zeros(info.tokenizer["vocab_size"])
    for number in range(len(rows)):
        row = rows[number]
        counts_V += np.bincount(row["tokens"][row["segment_ids"] > 0], minlength=len(counts_V))
        tokens = row["tokens"][:length]
        # One document without its end: what comes after an end is another text.
        is_one_text = len(set(row["segment_ids"][:length])) == 1 and eos_id not in tokens
        if len(tokens) == length and is_one_text:
            found.append(tokens)
    if len(found) < num_prompts:
        raise UserError(
            f"{data} has {len(found)} held-out rows of {length} tokens within one document; give "
            f"--num-prompts {len(found)} or less."
        )
    places = np.linspace(0, len(found) - 1, num_prompts).astype(int)
    tokens_BT = np.stack([found[place] for place in places])
    counts_V[eos_id] = 0
    return tokens_BT[:, :prompt_length], tokens_BT[:, prompt_length:], counts_V / counts_V.sum()


def judged_by(control, prompts: list[list[int]], tokens_BT: np.ndarray) -> Samples:
    """Returns what an autoregressive model pays for the continuations of prompts."""
    scores = control.score(list(zip(prompts, tokens_BT.tolist(), strict=True)))
    pairs = zip(prompts, tokens_BT, strict=True)
    texts = [decode_after(control.tokenizer, *pair) for pair in pairs]
    return Samples(
        -np.array([score.log_likelihood for score in scores]),
        np.array([len(text.encode()) for text in texts]),
        tokens_BT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a masked diffusion model")
    parser.add_argument("--control", required=True, help="an autoregressive model, which judges")
    parser.add_argument("--data", required=True, help="as `prepare` wrote it, with held-out rows")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--gen-length", type=int, default=48)
    parser.add_argument("--block-length", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--families", nargs="+", help="measure these alone, and the reference")
    args = parser.parse_args()
    model, control = llada_jax.load(args.checkpoint), llada_jax.load(args.control)
    tokenizer = model.tokenizer
    if model.record.mask.causal or not control.record.mask.causal:
        raise UserError("--checkpoint must be a masked diffusion model, and --control causal.")
    if control.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{args.control} has another tokenizer than {args.checkpoint}.")
    prompts_BT, real_BT, frequency_V = held_out(
        args.data,
        num_prompts=args.num_prompts,
        prompt_length=args.prompt_length,
        gen_length=args.gen_length,
        eos_id=tokenizer.eos_id,
    )
    prompts = prompts_BT.tolist()
    request = {
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
        "num_ids": tokenizer.vocab_size,
        "gen_length": args.gen_length,
        "temperature": args.temperature,
        # Every text has the same length, so that the measures compare like with like.
        "suppress": tokenizer.end_ids,
        "batch_size": args.batch_size,
    }

    judged = functools.partial(judged_by, control, prompts)
    width = args.prompt_length + args.gen_length

    # The texts of the schedule are also the first candidates of the best of several.
    @functools.cache
    def sampled(*, seed: int, **settings) -> Drawn:
        cost = Cost(len(prompts), width, args.gen_length, args.block_length)
        cost.cache, cost.refresh = settings.get("cache", "none"), settings.get("refresh", 0)
        tokens_BT, num_steps_B = generate_tokens(
            model.model.logits_fn,
            model.params,
            prompts,
            cached_fn=model.model.cached_fn,
            shadow_fn=model.model.shadow_fn,
            block_length=args.block_length,
            on_step=cost.on_step,
            seed=seed,
            **request,
            **settings,
        )
        assert (cost.passes_B == num_steps_B).all()
        return Drawn(judged(tokens_BT), cost.passes_B, cost.columns_B)

    @functools.cache
    def scored(*, seed: int, **settings) -> tuple[np.ndarray, np.ndarray]:
        """Returns the model's log-likelihood of each text, float [B], and the passes that it took.
        All texts of a prompt are scored under the same noise.
        """
        tokens_BT = sampled(seed=seed, **settings).samples.tokens_BT
        # as many samples as `sample --best-of` takes
        scores = model.score(list(zip(prompts, tokens_BT.tolist(), strict=True)), mc_samples=32)
        likelihood_B = np.array([score.log_likelihood for score in scores])
        return likelihood_B, np.array([score.num_passes for score in scores])

    def best(num: int, **settings) -> Drawn:
        drawn = [sampled(seed=seed, **settings) for seed in range(num)]
        likelihoods, passes = zip(*(scored(seed=seed, **settings) for seed in range(num)))
        scoring_B = np.sum(passes, axis=0)
        return Drawn(
            best_of([one.samples for one in drawn], np.stack(likelihoods)),
            sum(one.passes_B for one in drawn) + scoring_B,
            sum(one.columns_B for one in drawn) + width * scoring_B,
        )

    of_control, _ = continue_tokens(
        control.model.cached_fn, control.params, prompts, bos_id=tokenizer.bos_id, **request
    )
    baselines = {"real text": judged(real_BT), "the control": judged(of_control)}
    found = {
        "checkpoint": args.checkpoint,
        "control": args.control,
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "settings": {key: value for key, value in vars(args).items() if key != "families"},
        "baselines": {name: quality(one, frequency_V)._asdict() for name, one in baselines.items()},
        "rows": [],
    }
    reference = None
    directory = Path(args.output)
    directory.mkdir(parents=True, exist_ok=True)
    for family, choices in settings_of(args.gen_length, args.block_length).items():
        for name, settings in choices.items():
            if args.families and name != REFERENCE and family not in args.families:
                continue
            start = time.perf_counter()
            num = settings.pop("best_of", 0)
            drawn = best(num, **settings) if num else sampled(seed=0, **settings)
            samples = drawn.samples
            reference = samples if reference is None else reference
            _, errors = difference(samples, reference, frequency_V)
            found["rows"].append(
                {
                    "family": family,
                    "name": name,
                    "passes_per_token": float(drawn.passes_B.mean() / args.gen_length),
                    "columns_per_token": float(drawn.columns_B.mean() / args.gen_length),
                    **quality(samples, frequency_V)._asdict(),
                    "errors": errors._asdict(),
                    "is_no_worse": is_no_worse(samples, reference, frequency_V),
                    "text": decode_after(tokenizer, prompts[0], samples.tokens_BT[0]),
                }
            )
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            (directory / "frontier.json").write_text(json.dumps(found, indent=1) + "\n")
            (directory / "frontier.md").write_text(table(found))
    print(table(found))


def table(found: dict) -> str:
    """Returns the result as a Markdown table, and in a sentence."""
    lines = [
        "| setting | passes per token | columns per token | bits per byte | repetition "
        "| unigram distance | no worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found["baselines"].items():
        lines.append(f"| {name} | | | {_measures(one)} | |")
    for row in found["rows"]:
        cost = f"{row['passes_per_token']:.3f} | {row['columns_per_token']:.1f}"
        answer = "yes" if row["is_no_worse"] else "no"
        lines.append(f"| {row['name']} | {cost} | {_measures(row)} | {answer} |")
    first, equal = found["rows"][0], [row for row in found["rows"] if row["is_no_worse"]]
    lines.append("")
    for cost in ("passes", "columns"):
        least = min(equal, key=lambda row: row[f"{cost}_per_token"])
        times = first[f"{cost}_per_token"] / least[f"{cost}_per_token"]
        lines.append(
            f"Fewest {cost} at no worse quality: {least['name']}, {times:.1f} times fewer."
        )
    return "\n".join(lines) + "\n"


def _measures(one: dict) -> str:
    numbers = (one["bits_per_byte"], one["repetition"], one["unigram_distance"])
    return " | ".join(f"{number:.3f}" for number in numbers)


if __name__ == "__main__":
    main()
