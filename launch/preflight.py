"""What is wrong with a command, as far as it can be known before machines are rented for it.

This is not a launcher; those that wait for machines or pay for them call `check`. It reads the
command that every host is to run with the parsers and the config of the package itself, so that it
refuses what the hosts would refuse, in the same words, and in addition what only the launcher can
know: which disks the hosts share, which chips they have and which extras are installed there.
"""

import dataclasses
import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llada_jax.__main__ import VERBS
from llada_jax.cluster.hardware import Slice
from llada_jax.config import load_config, own_parts, parse_sources
from llada_jax.errors import UserError, look_up
from llada_jax.parts import load_part
from llada_jax.paths import check_savable, split_step, user_path
from llada_jax.storage.remote import LIBRARIES, is_remote
from llada_jax.validation import NO_TRACKER

# Flags that name what a command reads, and what it writes.
READ_FLAGS = (
    *("checkpoint", "from", "data", "input", "tasks"),
    *("tokenizer", "prompt_file", "chat_template"),
)
WRITTEN_FLAGS = ("workdir", "output", "report", "html", "join", "plot")
# Of these, what an empty path would not leave out.
NEVER_EMPTY = ("checkpoint", "workdir", "output", "report")
# {verb: flags whose files it opens on a disk}; and those that read URLs of any kind.
ONLY_ON_DISKS = {
    "import": ("from",),
    "sample": ("prompt_file",),
    "export": ("output", "chat_template"),
    "prepare": ("output",),
    "sweep": ("plot",),
}
OF_FSSPEC = ("input", "tasks")
# Extras that a verb needs whatever its flags are; the extra of a URL has the name of its scheme.
EXTRAS_OF_VERBS = {"import": "hf", "export": "hf"}
# Rows of the embedding where only the tokenizer knows them: enough for shapes, not for memory.
STAND_IN_VOCAB_SIZE = 131_072


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a command is to run, as far as this decides whether it can.

    Attributes:
        machines: one slice, or all GPUs; None where the kind of device is not known.
        num_slices: how many of them.
        num_devices: JAX devices of the run; 0 where they are not known either.
        shares_disks: whether the hosts see the files of this machine under the same paths.
        mounts: {directory that every host sees: whether it can be written to}.
        has_own_disks: whether the hosts may have disks that the launcher does not know of.
        extras: of setup.py, which the hosts have installed; None where they are not known.
        how_to_install: the end of a sentence, about an extra that they lack.
        root: where relative paths to a config begin on this machine.
    """

    machines: Slice | None = None
    num_slices: int = 1
    num_devices: int = 0
    shares_disks: bool = False
    mounts: dict[str, bool] = dataclasses.field(default_factory=dict)
    has_own_disks: bool = False
    extras: tuple[str, ...] | None = None
    how_to_install: str = ""
    root: Path = Path()


def words_of(command: list[str]) -> list[str] | None:
    """Returns the words that follow `llada-jax`, None for another program."""
    program = Path(command[0]).name
    if program == "llada-jax":
        return command[1:]
    return command[3:] if command[1:3] == ["-m", "llada_jax"] else None


def _words_with_config(command: list[str]) -> Iterator[tuple[int, str]]:
    """Yields where a command of llada-jax names a config file: the number of the word, and what
    precedes the file in this word.
    """
    for number, word in enumerate(command) if words_of(command) else ():
        if word.startswith("--config="):
            yield number, "--config="
        elif word == "--config" and number + 1 < len(command):
            yield number + 1, ""


def config_of(command: list[str]) -> str:
    """Returns the config file that a command of llada-jax names, as this machine reads its path,
    "" without one. Of several the last one counts, as for the command itself.
    """
    for number, before in reversed(list(_words_with_config(command))):
        return user_path(command[number].removeprefix(before))
    return ""


def with_config(command: list[str], file: str) -> list[str]:
    """Returns a command of llada-jax that names another config file."""
    words = list(command)
    for number, before in _words_with_config(command):
        words[number] = f"{before}{file}"
    return words


def check(command: list[str], place: Place, *, indices: Sequence[int] = ()) -> str:
    """Returns one line about a command that can run in a place.

    Args:
        indices: of a sweep, the runs that such commands start, each with its own --index; ():
            the one that the command names, or all.

    Raises:
        UserError: it cannot; the message has the remedy.
    """
    words = words_of(command)
    if words is None:
        return f"{command[0]} is not llada-jax, so that its words are not checked"
    if not words or {"--help", "-h", "--version"} & set(words):
        return "the command only shows its help"
    verb, *flags = words
    module, _ = look_up(VERBS, verb, "verb")
    parser = importlib.import_module(f"llada_jax.verbs.{module}").make_parser()
    args, overrides = parser.parse_with_overrides(flags[: _cut(flags)])
    check_flags(verb, args, flags[_cut(flags) + 1 :])
    check_extras(verb, args, place)
    check_mesh(args, place)
    check_paths(verb, args, place)
    lines = [check_config(config, place) for config in configs_of(args, overrides, place, indices)]
    return ": ".join([f"llada-jax {verb} can run there", *dict.fromkeys(filter(None, lines[:1]))])


def _cut(words: list[str]) -> int:
    return words.index("--") if "--" in words else len(words)


def check_flags(verb: str, args, rest: list[str]) -> None:
    """Raises UserError for flags that a verb refuses together, before it reads anything."""
    if verb == "sweep":
        from llada_jax.verbs import sweep

        sweep.check_flags(args, rest)
    elif verb == "evaluate":
        from llada_jax.verbs import evaluate

        evaluate.check(args)
    elif verb == "sample":
        from llada_jax.verbs import sample

        sample.read_settings(args)


def check_extras(verb: str, args, place: Place) -> None:
    """Raises UserError when the hosts lack an extra that a verb needs, whatever its paths are."""
    needed = [EXTRAS_OF_VERBS[verb]] if verb in EXTRAS_OF_VERBS else []
    needed += ["optuna"] if getattr(args, "optuna", None) else []
    needed += ["torch"] if getattr(args, "verify", None) else []
    if verb == "evaluate":
        from llada_jax.verbs.evaluate import is_harness

        needed += ["eval"] if is_harness(args) else []
    for extra in needed:
        check_extra(f"llada-jax {verb}", extra, place)


def check_extra(what: str, extra: str, place: Place) -> None:
    """Raises UserError when the hosts lack an extra that something needs."""
    if place.extras is not None and extra not in place.extras:
        raise UserError(
            f"{what} needs the extra {extra!r}, and the hosts have {', '.join(place.extras)}; "
            f"{place.how_to_install.format(extra=extra)}."
        )


def check_mesh(args, place: Place) -> None:
    """Raises UserError for a --mesh that is not one, or not of the devices of the hosts."""
    if not getattr(args, "mesh", None):
        return
    from llada_jax.cluster.sharding import mesh_shape, parse_mesh

    sizes = parse_mesh(args.mesh)
    if place.machines:
        num_devices = place.machines.num_devices * place.num_slices
        mesh_shape(sizes, num_devices, num_slices=place.num_slices)
    elif place.num_devices:
        mesh_shape(sizes, place.num_devices)


def check_paths(verb: str, args, place: Place) -> None:
    """Raises UserError for a path of a flag that the hosts cannot read, or write to."""
    for flag in (*READ_FLAGS, *WRITTEN_FLAGS):
        given = getattr(args, flag, None)
        name = f"--{flag.replace('_', '-')}"
        if given == "" and flag in NEVER_EMPTY:
            raise UserError(f"{name} is empty; give a directory or a URL.")
        takes_urls = flag not in ONLY_ON_DISKS.get(verb, ())
        for path in given if isinstance(given, list) else [given] if given else []:
            if not is_path(flag, path):
                continue
            if flag == "checkpoint":
                path, _ = split_step(path)
            if flag in ("workdir", "output"):
                check_savable(path)
            if flag in OF_FSSPEC and is_remote(path):
                check_extra(f"{name} {path}", "data", place)
                if path.partition("://")[0] not in LIBRARIES:
                    continue
            is_written = flag in WRITTEN_FLAGS
            check_path(f"{name} ", path, place, is_written=is_written, takes_urls=takes_urls)


def is_path(flag: str, value: str) -> bool:
    """Whether the value of a flag is a path, and not the name of something that needs none."""
    if flag == "tokenizer":
        return value != "bytes" and not value.startswith(("spm:", "spm-bpe:"))
    if flag == "from":  # or a repository on the Hub
        return value.startswith(("/", ".")) or is_remote(value)
    return flag != "tasks" or value.endswith(".jsonl")


def check_path(
    what: str, path: str, place: Place, *, is_written: bool, takes_urls: bool = True
) -> None:
    """Raises UserError for a path that the hosts cannot read, or write to.

    Args:
        what: the flag or the knob, as the user writes it in front of the path.
        path: a path or a URL. takes_urls: whether it may be a URL.
    """
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        if not takes_urls:
            raise UserError(
                f"{what}{path} must be on a disk; write a path on one that the hosts share, such "
                "as a mounted bucket."
            )
        look_up(LIBRARIES, scheme, "kind of URL")
        if not rest.partition("/")[0]:
            raise UserError(f"{what}{path} names no bucket; write {scheme}://BUCKET/DIR.")
        check_extra(f"{what}{path}", scheme, place)
        return
    if place.shares_disks:
        return
    # with a .. it may lie outside
    around = [m for m in place.mounts if f"{os.path.normpath(path)}/".startswith(f"{m}/")]
    # a mount may lie within another
    mount = max(around, key=len, default=None)
    if mount is None and place.has_own_disks and not path.startswith("/"):
        raise UserError(
            f"{what}{path} is relative, and the hosts start in a directory of their own; write an "
            f"absolute path on a disk that they share{', or gs://BUCKET/DIR' * takes_urls}."
        )
    if mount is None and not place.has_own_disks:
        form = "BUCKET:/data" if is_written else "BUCKET:/data:ro"
        raise UserError(
            f"{what}{path} is not on a disk that the hosts share: "
            f"{'write gs://BUCKET/DIR, or ' * takes_urls}mount a bucket with --gcs-fuse {form} and "
            f"write {what}/data/DIR."
        )
    if mount is not None and is_written and not place.mounts[mount]:
        raise UserError(
            f"{what}{path} is written to, and {mount} is mounted to be read only; leave out the "
            f":ro of --gcs-fuse{', or write to gs://BUCKET/DIR' * takes_urls}."
        )


def configs_of(args, overrides: list[str], place: Place, indices: Sequence[int]) -> Iterator:
    """Yields the config of each run that a command starts; none for verbs without a config."""
    if not hasattr(args, "config"):
        return
    file = str(place.root / args.config)
    if not hasattr(args, "index"):
        yield load_config(file, overrides)
        return
    from llada_jax.sweeps.runs import load_sweep

    # In an empty directory, because what the workdir of the sweep holds may be far away; the hosts
    # compare it.
    with tempfile.TemporaryDirectory() as nowhere:
        sweep = load_sweep(file, overrides, nowhere)
    runs = sweep.runs
    wanted = indices or ([] if args.index is None else [args.index])
    for index in wanted if runs else ():
        if not 0 <= index < len(runs):
            raise UserError(
                f"--index {index} is not a run of {args.config}, which has {len(runs)}; give 0 to "
                f"{len(runs) - 1}."
            )
    runs = [runs[index] for index in wanted] if wanted and runs else runs
    yield from [run.config for run in runs] or [sweep.base]


def check_config(config, place: Place) -> str:
    """Returns a line about the memory of a run; raises UserError when it cannot run in a place."""
    num_ids = check_data(config, place)
    vocab_size = config.model.vocab_size or num_ids
    for knob in ("restore", "init_from"):
        if path := config.checkpoint[knob]:
            workdir, _ = split_step(path)
            check_path(f"config.checkpoint.{knob}=", workdir, place, is_written=False)
    # A directory for compiled programs may be on the host's own disk; only a URL can be wrong.
    if is_remote(cache := config.log.compilation_cache):
        check_path("config.log.compilation_cache=", cache, place, is_written=False)
    if (tracker := config.log.tracker) != NO_TRACKER:
        check_extra(f"config.log.tracker={tracker}", tracker, place)
    for knob, name in own_parts(config).items():
        load_part(name, knob.partition(".")[0], {})
    vocab = vocab_size or STAND_IN_VOCAB_SIZE
    if not place.machines:
        check_objective(config, vocab)
        if place.num_devices:
            check_split(config, place.num_devices, vocab)
        return ""
    import jax

    from llada_jax.units import format_bytes
    from llada_jax.verbs.plan import Asked, describe_mesh, estimate

    # Where the launcher runs, chips are not to be touched: another run may have them.
    jax.config.update("jax_platforms", "cpu")
    report = estimate(Asked(config, place.machines, place.num_slices, vocab))
    mesh = f"mesh {describe_mesh(report['mesh'])} on {place.num_slices} x {place.machines.name}"
    if not vocab_size:
        return mesh
    peak, usable = report["memory"]["peak"], report["usable_bytes"]
    fits = "" if peak < usable else ", which is estimated not to fit: ask `llada-jax plan`"
    return f"{mesh}, {format_bytes(peak)} of {format_bytes(usable)} per device (estimate){fits}"


def check_objective(config, vocab_size: int) -> None:
    """Raises UserError for an objective that does not fit the other knobs, on any machines."""
    from llada_jax.objectives.named import make_objective
    from llada_jax.planning.absent_devices import stand_in_tokenizer
    from llada_jax.training.step import check_objective_fits

    objective = make_objective(stand_in_tokenizer(vocab_size), **config.objective)
    check_objective_fits(config, objective, None)


def check_split(config, num_devices: int, vocab_size: int) -> None:
    """Raises UserError when batch and network cannot be split over devices of an unknown kind."""
    from llada_jax.cluster.sharding import abstract_mesh
    from llada_jax.planning.absent_devices import stand_in_tokenizer
    from llada_jax.training.step import architecture_of, check_mesh

    architecture = architecture_of(config.model, stand_in_tokenizer(vocab_size))
    check_mesh(config, architecture, abstract_mesh(config.mesh, num_devices))


def check_data(config, place: Place) -> int:
    """Returns the number of ids of the tokenizer of the records, 0 where they are not seen here.

    Raises:
        UserError: the hosts cannot read config.data.path, or it is not what `prepare` has written.
    """
    sources = parse_sources(config.data.path)
    for directory, _ in sources:
        check_path("config.data.path=", directory, place, is_written=False)
    if not place.shares_disks:
        return 0
    from llada_jax.data.loader import describe
    from llada_jax.data.records import read_dataset

    describe(sources, sequence_length=config.data.sequence_length)
    return read_dataset(sources[0][0]).tokenizer["vocab_size"]
