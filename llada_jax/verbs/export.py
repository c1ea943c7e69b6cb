"""`llada-jax export`: a checkpoint becomes a Hugging Face directory that loads without this
package.

Weights go from the checkpoint to the files one stacked parameter at a time, so that a host holds
one of them and not the model. All is written into OUTPUT.partial, which takes its name only when it
is whole.
"""

import collections
import ctypes
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.record import mask_of
from llada_jax.checkpoints.workdir import Checkpoints, find_checkpoint
from llada_jax.cluster import distributed, sharding
from llada_jax.data.tokenizer import Tokenizer, load_same
from llada_jax.errors import UserError, reason, require
from llada_jax.hf import verify
from llada_jax.hf.card import heldout_result, model_card
from llada_jax.hf.convert import Tensor, choose_layout, hf_config, tensors
from llada_jax.hf.directory import becoming
from llada_jax.hf.tokenizer_json import tokenizer_files
from llada_jax.hf.verify import tokens_to_compare
from llada_jax.hf.write import DTYPES, Shard, begin, plan_shards, put, small_files, sync
from llada_jax.models.model import abstract_parameters, make_model
from llada_jax.models.transformer import Architecture, num_parameters
from llada_jax.run.metrics_file import read_lines
from llada_jax.units import format_bytes, format_count
from llada_jax.verbs.command_line import Parser

UNITS = {
    f"{prefix}{b}": n**power
    for b, n in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}


def main(argv: list[str]) -> None:
    parser = Parser(
        "export",
        "Writes a checkpoint as a Hugging Face directory: weights, PyTorch code, tokenizer, model "
        "card.",
        "llada-jax export --checkpoint runs/tiny/run --output exports/tiny --verify",
    )
    parser.usage = "llada-jax export --checkpoint WORKDIR[@STEP] --output DIR [flags]"
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CKPT", help="WORKDIR or WORKDIR@STEP")
    add("--output", required=True, metavar="DIR", help="local directory that the export becomes")
    add(
        "--dtype",
        default="bfloat16",
        choices=tuple(DTYPES),
        help="of the weights in the files (bfloat16)",
    )
    add("--shard-size", default="5GB", metavar="SIZE", help="most bytes of weights in a file (5GB)")
    add(
        "--ema",
        action="store_true",
        help="the moving average of the parameters, where the run kept one",
    )
    add(
        "--layout",
        default="auto",
        metavar="NAME",
        help="llada, illada or auto (default): llada where it can",
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
        help="upload it, as NAME/MODEL; a new repository is private",
    )
    add(
        "--dry-run",
        action="store_true",
        help="say what would be written and uploaded, and do neither",
    )
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    drop_echoes()
    distributed.initialize()
    plan = make_plan(args)
    if not args.dry_run:
        plan = plan._replace(result=carry_out(args, plan))
    if jax.process_index() == 0:
        print(json.dumps(plan.result) if args.json else report(plan.result))


class Plan(NamedTuple):
    """What an export will be, before anything is written."""

    found: Checkpoints
    step: int
    run: dict
    architecture: Architecture
    tokenizer: Tokenizer
    weights: str  # "params" or "ema": which item of the checkpoint
    tensors: list[Tensor]
    shards: list[Shard]
    files: dict[str, bytes]  # everything but the weights
    result: dict  # what is reported


def check_license(license_id: str | None) -> None:
    """Raises UserError unless it is None or could be one of the Hub's identifiers, such as "cc-by-4.0"."""
    if license_id is not None and not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*", license_id):
        raise UserError(
            f"--license {license_id!r} must be an identifier of the Hub in lower case, such as "
            "apache-2.0, mit or cc-by-4.0; for a licence that the Hub does not list, write other."
        )


def make_plan(args) -> Plan:
    """Reads what the checkpoint says of itself and refuses what cannot be done.

    Raises:
        UserError: for every mistake that can be known before the weights are read.
    """
    check_output(args.output, force=args.force)
    check_upload(args.push_to_hub)
    shard_size = parse_size(args.shard_size)
    template = read_template(args.chat_template)
    check_license(args.license)
    if args.verify and jax.process_count() > 1:
        raise UserError(
            "--verify needs the whole model in one process; leave it out when exporting with "
            "several."
        )
    found, step = find_checkpoint(args.checkpoint)
    run = {"step": step, **found.run(step)}
    if mask_of(run).causal:
        objective = run["config"]["objective"]["name"]
        raise UserError(
            f"{args.checkpoint} was trained with objective.name={objective!r}, and the layouts of "
            "LLaDA attend in both directions; export a checkpoint of masked_diffusion."
        )
    keeps_ema = run["config"]["optimizer"]["ema_decay"] > 0
    if args.ema and not keeps_ema:
        raise UserError(
            f"--ema: {args.checkpoint} kept no moving average (optimizer.ema_decay=0); leave the "
            "flag out."
        )
    directory = found.directory.parent / "tokenizer"
    tokenizer = load_same(directory, run["tokenizer"]["fingerprint"], of="the checkpoint")
    a = Architecture(**run["architecture"])
    layout = choose_layout(a, args.layout)
    listed = tensors(layout, a)
    shards = plan_shards(listed, dtype=args.dtype, shard_size=shard_size)
    max_length = run["config"]["data"]["sequence_length"]
    ids = {name: getattr(tokenizer, name) for name in ("mask_id", "eos_id", "bos_id", "pad_id")}
    config = hf_config(
        a,
        layout,
        **ids,
        max_sequence_length=max_length,
        dtype=args.dtype,
        source=run.get("source", {}).get("config"),
    )
    name = args.push_to_hub or Path(args.output).absolute().name
    files = small_files(shards, config, layout)
    files |= tokenizer_files(tokenizer, max_length=max_length, chat_template=template)
    files["README.md"] = model_card(
        name=name,
        a=a,
        layout=layout,
        dtype=args.dtype,
        run=run,
        hf_config=config,
        weights="moving average of the parameters" if args.ema else "parameters",
        result=heldout_result(read_lines(found.directory.parent), step),
        special_tokens=tokenizer.special_tokens,
        license_id=args.license,
    ).encode()
    sizes = {
        **{shard.name: shard.size for shard in shards},
        **{name: len(content) for name, content in files.items()},
    }
    result = {
        "checkpoint": args.checkpoint,
        "step": step,
        "output": args.output,
        "layout": layout,
        "dtype": args.dtype,
        "weights": "ema" if args.ema else "params",
        "parameters": num_parameters(a),
        "keeps_ema": keeps_ema,
        "files": dict(sorted(sizes.items())),
        "dry_run": args.dry_run,
        "repository": args.push_to_hub,
    }
    return Plan(found, step, run, a, tokenizer, result["weights"], listed, shards, files, result)


def carry_out(args, plan: Plan) -> dict:
    """Writes, verifies and uploads; returns what is reported."""
    result = plan.result
    say(result)
    with becoming(Path(args.output).absolute()) as partial:
        write_weights(partial, plan, dtype=args.dtype)
        if jax.process_index() == 0:
            for name, content in plan.files.items():
                (partial / name).write_bytes(content)
                sync(partial / name)
            sync(partial)
        if args.verify:
            result = {**result, "verify": compare_with_torch(partial, plan, dtype=args.dtype)}
    if args.push_to_hub and jax.process_index() == 0:
        upload(args.output, args.push_to_hub)
    return result


# ---- what is asked for


def parse_size(text: str) -> int:
    """Returns the bytes of "5GB" or "512MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", text)
    if not match or not float(match[1]):
        raise UserError(f"--shard-size {text!r} is no size; write for example 5GB or 512MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def check_output(output: str, *, force: bool) -> None:
    """Raises UserError when the output cannot become an export, or is one and --force is not given."""
    if "://" in output:
        raise UserError(
            f"--output {output} must be a local or mounted directory; copy the finished one, or "
            "give --push-to-hub."
        )
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {output} is a file; give a directory.")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / "config.json").exists():  # --force must never delete somebody's home
        raise UserError(
            f"--output {output} is not empty and holds no export; give a new directory."
        )
    if not force:
        raise UserError(
            f"--output {output} holds an export already; give another, or --force to replace it."
        )


def check_upload(repo: str | None) -> None:
    """Raises UserError unless the hub takes what is to be uploaded; asked before the work, not
    after it.
    """
    if repo is None or jax.process_index() > 0:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(
            f"--push-to-hub {repo!r} must be a repository such as your-name/your-model."
        )
    hub = require("huggingface_hub", extra="hf")
    try:
        hub.HfApi().whoami()
    except Exception as error:  # the hub raises its own, its HTTP library's and the system's errors
        raise UserError(
            f"--push-to-hub {repo}: the hub does not know you ({reason(error)}); run `hf auth "
            "login`."
        ) from error


def read_template(path: str | None) -> str | None:
    """Returns the Jinja source in a file, of which jinja2 has found no fault."""
    if path is None:
        return None
    jinja2 = require("jinja2", extra="hf")
    try:
        template = Path(path).read_text()
        jinja2.Environment().parse(template)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {path} cannot be read ({reason(error)}); give a text file."
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--chat-template {path} is no Jinja template (line {error.lineno}: {error}); mend it."
        ) from error
    return template


# ---- the weights


def write_weights(directory: Path, plan: Plan, *, dtype: str) -> None:
    """Writes the shards, one stacked parameter after the other; of several processes each writes
    some of the shards.
    """
    number, count = jax.process_index(), jax.process_count()
    mine = [shard for i, shard in enumerate(plan.shards) if i * count // len(plan.shards) == number]
    shard_of = {name: shard for shard in mine for name in shard.start}
    for shard in mine:
        begin(directory, shard)
    by_path = collections.defaultdict(list)
    for tensor in plan.tensors:
        if tensor.name in shard_of:
            by_path[tensor.path].append(tensor)
    for path, group in by_path.items():
        read_and_put(directory, plan, path, group, shard_of, dtype=dtype)
    for shard in mine:
        sync(directory / shard.name)


def read_and_put(
    directory: Path, plan: Plan, path: str, group: list[Tensor], shard_of: dict, *, dtype: str
) -> None:
    """Reads one stacked parameter and writes its tensors; when it returns, nothing of it is held
    any more.
    """
    libc = ctypes.CDLL(None)
    # glibc: what the threads that read the last parameter have freed, they still hold
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    is_stacked = group[0].layer is not None
    shape = (plan.architecture.num_layers, *group[0].shape) if is_stacked else group[0].shape
    array = plan.found.read_array(plan.step, f"{plan.weights}/{path}", shape)
    for tensor in group:
        put(
            directory,
            shard_of[tensor.name],
            tensor,
            array[tensor.layer] if is_stacked else array,
            dtype=dtype,
        )


# ---- verify


def compare_with_torch(directory: Path, plan: Plan, *, dtype: str) -> dict:
    """Returns how far PyTorch's logits of an export are from the checkpoint's, see
    llada_jax.hf.verify.compare.

    Raises:
        NumericsError: too far, or the export cannot be loaded.
    """
    tokens_BT, origin = tokens_to_compare(plan.run, plan.tokenizer)
    model = make_model(plan.architecture, attention="xla")
    mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), devices=jax.local_devices()[:1])
    params = plan.found.restore_params(
        plan.step, abstract_parameters(model, mesh), ema=plan.weights == "ema"
    )
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)

    @jax.jit
    def logits(params):
        return model.logits_fn(params, tokens_BT, np.ones_like(tokens_BT), positions_BT)

    with jax.default_matmul_precision("highest"):
        ours_BTV = np.asarray(logits(params))
        rounded = jax.tree.map(
            lambda leaf: leaf.astype(DTYPES[dtype][1]).astype(leaf.dtype), params
        )
        rounded_BTV = np.asarray(logits(rounded))
    del params, rounded
    found = verify.compare(ours_BTV, rounded_BTV, verify.torch_logits(directory, tokens_BT))
    verify.check(found, dtype=dtype)
    return {**found, "num_tokens": tokens_BT.size, "tokens": origin}


# ---- upload


def upload(directory: str, repo: str) -> None:
    """Uploads an export; UserError when the hub refuses it."""
    api = require("huggingface_hub", extra="hf").HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message="Export from llada_jax"
        )
    except Exception as error:  # as in check_upload
        raise UserError(
            f"{directory} is complete, but {repo} did not take it ({reason(error)}); try again "
            f"with `hf upload {repo} {directory}`."
        ) from error


# ---- the words


def say(result: dict) -> None:
    """Says on stderr what is being written, from which weights."""
    if jax.process_index() > 0:
        return
    if result["keeps_ema"] and result["weights"] == "params":
        print(
            "llada-jax: the run keeps a moving average, which `sample` takes; --ema exports that.",
            file=sys.stderr,
        )
    print(f"llada-jax: {summary(result)}", file=sys.stderr)


def summary(result: dict) -> str:
    """Returns the layout chosen and what goes into it, in one line."""
    size, count = (
        sum(result["files"].values()),
        sum(name.endswith(".safetensors") for name in result["files"]),
    )
    return (
        f"layout {result['layout']}: {format_count(result['parameters'])} parameters of step "
        f"{result['step']} in {result['dtype']}, {format_bytes(size)}, {count} "
        f"file{'s' if count > 1 else ''} of weights -> {result['output']}"
    )


def report(result: dict) -> str:
    """Returns what is printed at the end."""
    if result["dry_run"]:
        lines = [f"would write {summary(result)}"]
        lines += [f"  {size:>15,}  {name}" for name, size in result["files"].items()]
        return "\n".join(
            [
                *lines,
                *(
                    [f"would upload all of it to {result['repository']}"]
                    if result["repository"]
                    else []
                ),
            ]
        )
    lines = [summary(result)]
    if "verify" in result:
        found = result["verify"]
        lines.append(
            f"verified on {found['num_tokens']} {found['tokens']} tokens: logits differ by at most "
            f"{found['max_difference']:.2g}, KL(checkpoint || export) {found['kl_nats']:.2g} nats"
        )
    if result["repository"]:
        lines.append(f"uploaded to {result['repository']}")
    return "\n".join(lines)
