"""`llada-jax export`: a checkpoint becomes a Hugging Face directory that loads without this
package.
"""

from pathlib import Path

import jax

from llada_jax.checkpoints.export import (
    Export,
    adapters_of,
    training_of,
    write_adapters,
    write_model,
)
from llada_jax.checkpoints.huggingface import tokenizer_of
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.workdir import find_checkpoint, identity
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.errors import UserError
from llada_jax.hf import hub
from llada_jax.hf.card import check_license, model_card
from llada_jax.hf.config_json import choose_layout, hf_config
from llada_jax.hf.convert import tensors
from llada_jax.hf.directory import check_output
from llada_jax.hf.peft import num_adapter_parameters
from llada_jax.hf.tokenizer_json import read_template, tokenizer_files
from llada_jax.hf.write import DTYPES, other_files, plan_shards
from llada_jax.masks import BIDIRECTIONAL
from llada_jax.models.transformer import num_parameters
from llada_jax.run.metrics_file import last_bound, read_lines
from llada_jax.streams import write_line
from llada_jax.units import format_bytes, format_count, parse_bytes
from llada_jax.verbs.command_line import Parser, join, json_text

# flags that say something about a whole model alone
OF_MODELS = ("--dtype", "--shard-size", "--tokenizer", "--chat-template", "--license", "--verify")


def make_parser() -> Parser:
    parser = Parser(
        "export",
        "Writes a checkpoint as a Hugging Face directory: weights, PyTorch code, tokenizer, model "
        "card.",
        "llada-jax export --checkpoint runs/tiny/run --output exports/tiny --verify",
    )
    parser.usage = "llada-jax export --checkpoint WORKDIR[@STEP] --output DIR [flags]"
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="WORKDIR or WORKDIR@STEP")
    add("--output", required=True, metavar="DIR", help="local directory to write")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the weights in the files (bfloat16)",
    )
    add("--shard-size", metavar="SIZE", help="most bytes of weights per file (5GB)")
    add(
        "--ema",
        action="store_true",
        help="export the moving average of the parameters, where the run kept one",
    )
    add(
        "--layout",
        default="auto",
        metavar="NAME",
        help="llada, illada or auto (default): llada where it can hold the model",
    )
    add(
        "--adapters",
        action="store_true",
        help="write the adapters alone, as peft loads them onto an export of the base",
    )
    add(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="tokenizer to write, for weights that have none",
    )
    add("--chat-template", metavar="FILE", help="Jinja template to put into the tokenizer's config")
    add(
        "--license",
        metavar="ID",
        help="of the weights, for the model card, e.g. mit (default: left open)",
    )
    add("--force", action="store_true", help="replace an export that DIR holds")
    add("--verify", action="store_true", help="compare its logits in PyTorch with the checkpoint's")
    add(
        "--push-to-hub",
        metavar="REPO",
        help="upload it to NAME/MODEL; a new repository is private",
    )
    add(
        "--dry-run",
        action="store_true",
        help="show what would be written and uploaded, and do neither",
    )
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    drop_echoes()
    join(args)
    export, result = prepare_export(args)
    if not args.dry_run:
        result = write_export(args, export, result)
    if jax.process_index() == 0:
        print(json_text(result) if args.json else report(result))


def prepare_export(args) -> tuple[Export, dict]:
    """Reads what the checkpoint says about itself and refuses what cannot be done; returns also
    what is reported.

    Raises:
        UserError: for every mistake that can be known before the weights are read.
    """
    # 1. The flags.
    check_output(args.output, force=args.force)
    if args.push_to_hub is not None and jax.process_index() == 0:
        hub.check_upload(args.push_to_hub)
    idle = [flag for flag in OF_MODELS if getattr(args, flag.lstrip("-").replace("-", "_"))]
    if args.adapters and idle:
        raise UserError(
            "--adapters writes adapters in float32 and their config and nothing else, so that "
            f"{', '.join(idle)} would have no effect; leave {'it' if len(idle) == 1 else 'them'} "
            "out."
        )
    dtype = args.dtype or "bfloat16"
    shard_size = parse_bytes(
        "5GB" if args.shard_size is None else args.shard_size, flag="--shard-size"
    )
    template = read_template(args.chat_template) if args.chat_template else None
    check_license(args.license)
    if args.verify and jax.process_count() > 1:
        raise UserError(
            "--verify needs the whole model in one process; leave it out when exporting with "
            "several."
        )

    # 2. The checkpoint.
    found, step = find_checkpoint(args.checkpoint)
    record = found.record(step)
    check_same_everywhere({"the checkpoint": identity(found, [step])})
    if record.mask != BIDIRECTIONAL:
        blocks = f"to its own block of {record.mask.block_length} positions and those before it"
        seen = "to the left alone" if record.mask.causal else blocks
        raise UserError(
            f"{args.checkpoint} was trained with objective.name={record.objective!r}, which "
            f"attends {seen}, and the layouts of LLaDA attend in both directions; export a "
            "checkpoint of masked_diffusion."
        )
    if args.ema and not record.keeps_ema:
        raise UserError(
            f"--ema: {args.checkpoint} kept no moving average (optimizer.ema_decay=0); leave the "
            "flag out."
        )
    workdir = found.directory.parent
    tokenizer = tokenizer_of(found, record, given=args.tokenizer)
    has_text = tokenizer.kind != "none"
    if template is not None and not has_text:
        raise UserError(
            f"--chat-template belongs into a tokenizer, and {args.checkpoint} has none; give one "
            "with --tokenizer, or leave the template out."
        )

    # 3. The files.
    if args.adapters and not record.lora.rank:
        raise UserError(
            f"--adapters: {args.checkpoint} was trained without any (config.lora.rank=0); leave "
            "the flag out."
        )
    a = record.architecture
    layout = choose_layout(a, args.layout)
    listed = tensors(layout, a)
    found.check_parameters(step, {tensor.path for tensor in listed}, ema=args.ema)
    shards = plan_shards(listed, dtype=dtype, shard_size=shard_size)
    max_length = record.sequence_length
    source = record.source or {}
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "eos_id", "bos_id", "pad_id")}
    config = hf_config(
        a,
        layout,
        **ids,
        max_sequence_length=max_length,
        dtype=dtype,
        eot_id=tokenizer.eot_id,
        num_ids=tokenizer.vocab_size,
        source=source.get("config"),
    )
    others = other_files(shards, config, layout)
    if has_text:
        others |= tokenizer_files(tokenizer, max_length=max_length, chat_template=template)
    others["README.md"] = model_card(
        name=args.push_to_hub or Path(args.output).absolute().name,
        a=a,
        layout=layout,
        dtype=dtype,
        training=training_of(record, step),
        hf_config=config,
        weights="moving average of the parameters" if args.ema else "parameters",
        result=last_bound(read_lines(workdir), step),
        special_tokens=tokenizer.special_tokens,
        has_tokenizer=has_text,
        license_id=args.license,
    ).encode()
    weights = "ema" if args.ema else "params"
    export = Export(found, step, record, tokenizer, weights, layout, dtype, listed, shards, others)
    count = num_parameters(a)
    if args.adapters:
        # a few numbers next to those of the model, and there is no model to describe
        export = export._replace(dtype="float32", shards=[], others=adapters_of(export))
        count = num_adapter_parameters(export.others)
    sizes = {shard.name: shard.size for shard in export.shards}
    sizes |= {name: len(content) for name, content in export.others.items()}
    result = {
        "checkpoint": args.checkpoint,
        "step": step,
        "output": args.output,
        "layout": layout,
        "dtype": export.dtype,
        "weights": weights,
        "parameters": count,
        "keeps_ema": record.keeps_ema,
        "files": dict(sorted(sizes.items())),
        "dry_run": args.dry_run,
        "repository": args.push_to_hub,
    }
    return export, result


def write_export(args, export: Export, result: dict) -> dict:
    """Writes, verifies and uploads; returns what is reported."""
    announce(result)
    output = Path(args.output).absolute()
    if args.adapters:
        write_adapters(export, output, force=args.force)
    else:
        verified = write_model(export, output, verify=args.verify, force=args.force)
        result = result if verified is None else {**result, "verify": verified}
    if args.push_to_hub and jax.process_index() == 0:
        hub.upload(args.output, args.push_to_hub)
    return result


# ---- what is printed


def announce(result: dict) -> None:
    """Says on stderr what is being written, and from which weights."""
    if jax.process_index() > 0:
        return
    if result["keeps_ema"] and result["weights"] == "params":
        write_line(
            "llada-jax: the run keeps a moving average, which `sample` takes; --ema exports that."
        )
    write_line(f"llada-jax: {summary(result)}")


def summary(result: dict) -> str:
    """Returns in one line the layout that was chosen and what goes into it."""
    size = sum(result["files"].values())
    count = sum(name.endswith(".safetensors") for name in result["files"])
    return (
        f"layout {result['layout']}: {format_count(result['parameters'])} parameters of step "
        f"{result['step']} in {result['dtype']}, {format_bytes(size)}, {count} "
        f"file{'s' if count > 1 else ''} of weights -> {result['output']}"
    )


def report(result: dict) -> str:
    """Returns what is printed at the end."""
    repository = result["repository"]
    if result["dry_run"]:
        lines = [f"would write {summary(result)}"]
        lines += [f"  {size:>15,}  {name}" for name, size in result["files"].items()]
        if repository:
            lines.append(f"would upload all of it to {repository}")
        return "\n".join(lines)
    lines = [summary(result)]
    if "verify" in result:
        found = result["verify"]
        lines.append(
            f"verified on {found['num_tokens']} {found['tokens']} tokens: logits differ by at most "
            f"{found['max_difference']:.2g}, KL(checkpoint || export) {found['kl_nats']:.2g} nats"
        )
    if repository:
        lines.append(f"uploaded to {repository}")
    return "\n".join(lines)
