"""`llada-jax evaluate`: the likelihood bound of a checkpoint on records, next to baselines without
a network.
"""

from llada_jax import pretrained
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.cluster import sharding
from llada_jax.data.records import read_dataset
from llada_jax.data.tokenizer import load_same
from llada_jax.errors import UserError
from llada_jax.evaluation.baselines import unigram_bits_per_byte, xz_bits_per_byte
from llada_jax.evaluation.splits import bound_of_split
from llada_jax.objectives.named import make_objective
from llada_jax.verbs.command_line import Parser, json_text


def main(argv: list[str]) -> None:
    parser = Parser(
        "evaluate",
        "Prints the bound on the likelihood of a split: nats per token and bits per byte.",
        "llada-jax evaluate --checkpoint runs/tiny/run --data runs/tiny/data --mc-samples 4",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="WORKDIR, WORKDIR@STEP or Hugging Face directory",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="directory written by prepare")
    parser.add_argument("--split", default="heldout", help="train or heldout (default)")
    parser.add_argument(
        "--mc-samples", type=int, default=1, metavar="N", help="corruptions drawn for each row (1)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="rows scored at a time (64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the corruptions (0)")
    parser.add_argument(
        "--baselines", action="store_true", help="also score unigram and xz -9 on the same text"
    )
    parser.add_ema_flag()
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    for flag in ("mc_samples", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1.")
    drop_echoes()
    result = evaluate(args)
    if args.json:
        print(json_text(result))
    else:
        print(report(result))


def evaluate(args) -> dict:
    """Returns the bound and, if asked for, the baselines, as a flat dict."""
    model = pretrained.load(args.checkpoint, ema=args.ema)
    info = read_dataset(args.data)
    if info.tokenizer["fingerprint"] != model.tokenizer.fingerprint and not load_same(
        f"{args.data}/tokenizer", info.tokenizer["fingerprint"], of="the records"
    ).behaves_like(model.tokenizer):
        raise UserError(
            f"{args.data} was prepared with another tokenizer "
            f"({info.tokenizer['fingerprint'][:12]}) than the checkpoint's "
            f"({model.tokenizer.fingerprint[:12]}); prepare it with --tokenizer "
            f"{args.checkpoint}/tokenizer."
        )
    objective = make_objective(model.tokenizer, **model.config["objective"])
    split = info.split(args.split)
    bound = bound_of_split(
        model.model,
        model.params,
        args.data,
        split=args.split,
        objective=objective,
        bytes_per_token=split.num_scored_bytes / split.num_scored_tokens,
        batch_size=args.batch_size,
        sequence_length=info.sequence_length,
        batch_sharding=sharding.batch_sharding(model.mesh),
        # as in training: a model that never saw a document end within a row is not asked to. Of
        # dialogues, none may see another.
        attend_across_documents=(
            model.config["data"]["attend_across_documents"] and info.dialogues is None
        ),
        seed=args.seed,
        num_draws=args.mc_samples,
    )
    # the keys are what scripts read; they stay
    result = {
        "checkpoint": str(args.checkpoint),
        "step": model.step,
        "split": args.split,
        "num_tokens": bound.num_tokens,
        "mc_samples": args.mc_samples,
        f"{objective.bound_name}_nats_per_token": bound.nats_per_token,
        "standard_error": bound.standard_error,
        "bits_per_byte": bound.bits_per_byte,
        "bits_per_byte_standard_error": bound.bits_per_byte_standard_error,
    }
    if args.baselines:
        alone, after_train = xz_bits_per_byte(info, model.tokenizer, split=args.split)
        result["unigram_bits_per_byte"] = unigram_bits_per_byte(info, split=args.split)
        result["xz_bits_per_byte"] = alone
        result["xz_after_train_bits_per_byte"] = after_train
    return result


def report(result: dict) -> str:
    """Returns the result as aligned lines."""
    kind = "exactly" if "nll_nats_per_token" in result else "an upper bound"
    lines = [
        f"bits per byte of the {result['split']} text ({result['num_tokens']:,} tokens), lower is "
        "better",
        f"  {result['bits_per_byte']:.3f} +- {result['bits_per_byte_standard_error']:.3f}  this "
        f"model at step {result['step']}, {kind}",
    ]
    named = {
        "unigram_bits_per_byte": "token frequencies of the training text",
        "xz_bits_per_byte": "xz -9 on this text alone",
        "xz_after_train_bits_per_byte": "xz -9 after reading the training text",
    }
    lines += [
        f"  {result[key]:.3f}           {meaning}"
        for key, meaning in named.items()
        if key in result
    ]
    return "\n".join(lines)
