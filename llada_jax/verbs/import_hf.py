"""`llada-jax import`: a Hugging Face checkpoint becomes a workdir at step 0: to continue from,
sample, evaluate, export.
"""

import contextlib
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
from etils import epath

from llada_jax.checkpoints.huggingface import HuggingFace
from llada_jax.checkpoints.orbax_patches import drop_echoes
from llada_jax.checkpoints.record import write_run
from llada_jax.checkpoints.workdir import Checkpoints, identity_of
from llada_jax.cluster import sharding
from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.errors import UserError
from llada_jax.hf import hub
from llada_jax.hf.read import is_huggingface
from llada_jax.hf.starting_config import NAME, starting_config
from llada_jax.models.model import abstract_parameters, check_mesh, make_model
from llada_jax.models.transformer import Architecture, num_parameters
from llada_jax.run.start import made_workdir, seen
from llada_jax.storage.files import writing
from llada_jax.storage.locks import only_run_in
from llada_jax.storage.remote import path_of
from llada_jax.streams import write_line
from llada_jax.training.state import TrainState
from llada_jax.units import format_count
from llada_jax.verbs.command_line import Parser, join, json_text


def make_parser() -> Parser:
    parser = Parser(
        "import",
        "Turns a Hugging Face checkpoint (LLaDA, iLLaDA, Llama, Qwen2, Qwen3) into a workdir at "
        "step 0.",
        "llada-jax import --from GSAI-ML/LLaDA-8B-Base --output runs/llada-8b",
    )
    add = parser.add_argument
    add(
        "--from",
        required=True,
        metavar="HF",
        help="directory, or repository on the Hugging Face Hub",
    )
    add(
        "--output",
        required=True,
        metavar="WORKDIR",
        help="the workdir to write; must not hold anything yet",
    )
    add(
        "--mesh",
        default="fsdp=-1",
        metavar="AXES",
        help="devices to load onto, as in fsdp=8,tensor=2 (default: all)",
    )
    add(
        "--mask-token",
        default="",
        metavar="TOKEN",
        help="the token to use as the mask (default: its own, or a new one)",
    )
    add(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="tokenizer of weights that come without one (default: that of the directory)",
    )
    add(
        "--causal",
        action="store_true",
        help="keep Llama or Qwen autoregressive, instead of adapting them to masks",
    )
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    drop_echoes()
    join(args)
    named = vars(args)["from"]  # a word of Python
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh))
    check_output(args.output)
    source = HuggingFace(
        named if is_huggingface(named) else hub.download(named),
        causal=args.causal,
        mask_token=args.mask_token,
        tokenizer=args.tokenizer,
    )
    if args.causal and not source.is_causal:
        raise UserError(f"--causal: {named} is a masked diffusion model; leave the flag out.")
    record = source.record(0)
    # What the user named, which for a repository says more than the directory in the cache.
    record = dataclasses.replace(record, source={**(record.source or {}), "from": named})
    check_same_everywhere({"the checkpoint": identity_of(record, 0)})
    with jax.set_mesh(mesh), whole_or_nothing(args.output) as workdir:
        with made_workdir(args.output) as mark:
            check_same_everywhere({"the folder of --output": seen(mark)})
        if jax.process_index() == 0:
            write_run(workdir, source.tokenizer, record)
            if not args.causal:
                text = starting_config(
                    source.architecture,
                    source=named,
                    output=args.output,
                    has_tokenizer=source.tokenizer.kind != "none",
                )
                (workdir / NAME).write_text(text)
        params = load(source, mesh)
        state = TrainState(step=jnp.int32(0), params=params, opt_state=(), ema={}, metrics={})
        # Waits for the commit, without which it is not a workdir.
        with contextlib.closing(Checkpoints(workdir)) as saved:
            saved.save(state, record)
    if jax.process_index() == 0:
        result = {
            "output": args.output,
            "source": named,
            "layout": source.layout,
            "has_tokenizer": source.tokenizer.kind != "none",
            **(record.special_ids or {}),
        }
        result |= {
            "parameters": num_parameters(source.architecture),
            "architecture": record.to_json()["architecture"],
        }
        print(json_text(result) if args.json else report(result))


def check_output(output: str) -> None:
    """Raises UserError unless the output is absent or an empty directory."""
    path = path_of(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"--output {output} exists and is not empty; give another, or remove it first."
        )


def load(source: HuggingFace, mesh) -> dict:
    """Returns the parameters, in the shards of the mesh."""
    a = source.architecture
    check_mesh(a, mesh)
    write_line(
        f"llada-jax: reading {format_count(num_parameters(a))} parameters of {source.directory}"
    )
    return source.restore_params(0, abstract_parameters(make_model(a), mesh))


@contextlib.contextmanager
def whole_or_nothing(output: str):
    """Yields the new workdir as a path; when what is done in it fails, nothing of it is left.

    Not storage.files.whole_directory: several processes save into the folder, which may be in a
    bucket. It does not pass for a workdir before the checkpoint is committed, which comes last.

    Raises:
        UserError: the disk refuses, or another command writes there or has written there.
    """
    path = epath.Path(output)
    existed = path.exists()
    refusals = functools.partial(
        writing,
        f"--output {output}",
        remedy="choose another, free space, or change its permissions",
    )
    with contextlib.ExitStack() as until_end:
        with refusals():
            path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            holder, wait = "Another import, or a train, is", "wait for it to end"
            held = only_run_in(output, holder=holder, remedy=f"{wait}, or give another --output")
            until_end.enter_context(held)
            # Again: while the source was read or downloaded, another import may have finished.
            check_output(output)
        try:
            with refusals():
                yield path
        except BaseException:
            if jax.process_index() == 0:
                remove(path, but_itself=existed)
            raise


def remove(path, *, but_itself: bool) -> None:
    """Removes what a failed import has written, as far as the disk lets it.

    The first write that fails ends the save, while the threads of tensorstore go on with the other
    writes and create their folders again. Nothing can wait for them, so what appears again is
    removed again, until nothing has appeared for half a second.
    """
    num_quiet = 0
    for _ in range(50):
        try:
            remains = list(path.iterdir()) if path.exists() else []
            for child in remains:
                child.rmtree() if child.is_dir() else child.unlink()
            num_quiet = 0 if remains else num_quiet + 1
        except OSError:
            # A late writer came in between, or the disk does not let us.
            num_quiet = 0
        if num_quiet == 5:
            break
        time.sleep(0.1)
    if not but_itself:
        with contextlib.suppress(OSError):
            path.rmdir()


def report(result: dict) -> str:
    """Returns what was imported, as the lines of a config that continues from it."""
    a = Architecture(**result["architecture"])
    lines = [
        f"# {result['source']} ({result['layout']}, {format_count(result['parameters'])} "
        f"parameters) -> {result['output']}",
        f"# Data for it: llada-jax prepare --tokenizer {result['output']}/tokenizer ..."
        if result["has_tokenizer"]
        else "# It has no tokenizer; import it with --tokenizer to prepare data for it.",
        "# A config that continues from it:",
        *(f"config.model.{name} = {value!r}" for name, value in vars(a).items()),
        f"config.checkpoint.init_from = {result['output']!r}",
    ]
    return "\n".join(lines)
