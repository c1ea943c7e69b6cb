"""Every knob of a training run: its unit, its default, and what makes a set of them impossible.

A run is described by one small Python file (see `configs/`) with `get_config()` that starts from
`default_config()` and changes what differs; `--config.group.key=value` changes single knobs on the
command line. Only verbs and training/step.py see the config; everything below takes keyword
arguments.
"""

import ast
import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llada_jax.errors import UserError, did_you_mean, without_value
from llada_jax.parts import add_to_path, is_own
from llada_jax.paths import user_path
from llada_jax.validation import AUTO, OWN_PARTS, READ_BY, knob, knobs, resolved, unread, validate


def default_config() -> ConfigDict:
    """Returns the config in which every knob exists, at the published LLaDA pretraining defaults
    where there is one.
    """
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 0  # optimizer steps; 0: derived from num_tokens
    # nominal tokens, batch_size * sequence_length per step; 0: derived from num_steps
    config.num_tokens = 0

    config.data = ConfigDict()
    # directory written by `llada-jax prepare`, or a mixture "dir_a=0.7,dir_b=0.3" (weights)
    config.data.path = ""
    config.data.batch_size = 64  # global, in sequences, for one optimizer step
    config.data.sequence_length = 4096  # tokens per row; must be the records' own
    config.data.random_length_probability = 0.01  # share of rows cut to their first U{1..T} tokens
    # False: attention and positions stop at document boundaries
    config.data.attend_across_documents = True
    # of dialogues with a row each (prepare --chat rows=padded): rows are filled up with
    # end-of-text tokens, as part of the answer, to the longest of this many rows; 0: not at all
    config.data.eos_padding = 0
    # ids that fill these rows up, in turn; (): end-of-text (as published)
    config.data.padding_cycle = ()
    # of dialogues or pairs with a row each: shorter lengths to which the padding of a batch is cut
    # off, ascending; the step is compiled for each
    config.data.length_buckets = ()
    # share of rows that are cut in two, which do not see each other
    config.data.split_probability = 0.0
    config.data.num_threads = 4  # reader threads per host
    config.data.prefetch = 8  # batches read ahead per host

    config.model = ConfigDict()
    # rows of the embedding; 0: the tokenizer's, rounded up to a multiple of 64
    config.model.vocab_size = 0
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12  # fewer than num_heads: grouped-query attention
    config.model.head_dim = 64
    config.model.d_ff = 2048  # hidden width of SwiGLU
    config.model.rope_theta = 500_000.0
    # (factor, low_freq_factor, high_freq_factor, original length), as in Llama 3.1; (): none
    config.model.rope_scaling = ()
    config.model.norm_eps = 1e-5
    config.model.tie_embeddings = False
    # none | full (over the whole q or k vector, as in LLaDA's code) | per_head
    config.model.qk_norm = "none"
    # none | qkv (as in Qwen2) | qkvo (as in Llama with attention_bias)
    config.model.attention_bias = "none"
    # True: position i is predicted from position i - 1, for weights of autoregressive models
    config.model.output_shift = False
    # of the matrix products: bfloat16 | float32; auto: float32 on CPU, bfloat16 elsewhere
    config.model.dtype = AUTO
    # xla | xla_by_head (CPU) | splash (TPU) | cudnn | triton (GPU); auto: from the mesh's platform
    config.model.attention = AUTO
    # what is recomputed in the backward pass; auto: as little as fits the devices, never none
    # none | dots | attention | full
    config.model.remat = AUTO
    # peak memory of the logits, in positions per row
    config.model.nll_chunk = 1024

    # In objective, optimizer and schedule, `name` may also be module:attribute of a part of your
    # own, which is called with `arguments`, ((name, value), ...); see docs/extend.md.
    config.objective = ConfigDict()
    # masked_diffusion | sft (dialogues) | vrpo (preferences) | autoregressive (the control)
    config.objective.name = "masked_diffusion"
    config.objective.arguments = ()  # of an objective of your own
    config.objective.eps = 1e-3  # p = (1 - eps) t + eps
    # With mirrored and bell, every second row takes 1 - t of the row before it.
    # stratified by row | mirrored in pairs of rows | iid (as published) | bell
    config.objective.t_sampling = "stratified"
    config.objective.bell_width = 0.2  # standard deviation of t (bell)
    # bernoulli | exact_count (k of L tokens, weight L/k)
    config.objective.masking = "bernoulli"
    # 1/p | none (in training alone; the reported NELBO always carries 1/p)
    config.objective.weight = "1/p"
    # what is masked (sft): answers | documents (their prompts too)
    config.objective.masked = "answers"
    # mean of the loss (sft): answers (each a mean over its tokens, as published) | tokens
    config.objective.mean_over = "answers"
    # p = eps + (max_mask_ratio - eps) t (sft)
    config.objective.max_mask_ratio = 1.0
    # whether each record is a row twice, with masks that complement each other (sft, or text)
    config.objective.complementary = False
    # share of dialogues whose prompt is hidden from the network, for guidance (sft)
    config.objective.prompt_dropout = 0.0
    # of the reward, per nat of difference from the reference (vrpo)
    config.objective.beta = 0.1
    # estimates of an answer's likelihood (vrpo): times drawn, and masks for each of them
    config.objective.num_times = 8
    config.objective.masks_per_time = 1
    # whether policy and reference are compared under the same masks (vrpo)
    config.objective.shared_draws = True

    # Low-rank adapters, which are trained in place of the network (docs/finetuning.md).
    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: none, the network is trained
    config.lora.alpha = 16.0  # the product of an adapter is multiplied by alpha / rank
    # regex that is found in the names of the adapted matrices, such as blocks/q and blocks/ff_up
    config.lora.targets = "blocks/[^f]"
    # how the matrices of the frozen network are kept: float32 | bfloat16 | int8 (of its layers)
    config.lora.frozen_dtype = "float32"

    config.optimizer = ConfigDict()
    # adamw | lion | muon
    config.optimizer.name = "adamw"
    config.optimizer.arguments = ()  # of an optimizer of your own
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    # in which the first moment is kept: float32 | bfloat16
    config.optimizer.first_moment_dtype = "float32"
    config.optimizer.weight_decay = 0.1  # decoupled, times the learning rate
    # (regex on the parameter's path, factor): the first match counts
    config.optimizer.weight_decay_multipliers = ((".*norm.*", 0.0), (".*bias", 0.0), (".*", 1.0))
    # (regex on the parameter's path, factor): the first match counts
    config.optimizer.learning_rate_multipliers = ((".*", 1.0),)
    config.optimizer.clip_norm = 1.0  # of the global gradient; 0: no clipping
    # per step, of the exponential moving average of the parameters; 0: none is kept
    config.optimizer.ema_decay = 0.0
    # steps per log interval whose gradient is not finite and which are skipped; 0: the run ends
    config.optimizer.max_skipped_updates = 0
    # microbatches per step; the update is that of the whole batch
    config.optimizer.gradient_accumulation = 1
    # in which devices add up gradients of matrices: compute (dtype of the products) | float32
    config.optimizer.gradient_dtype = "compute"

    config.schedule = ConfigDict()
    # llada | wsd | cosine | constant
    config.schedule.name = "llada"
    config.schedule.arguments = ()  # of a schedule of your own
    config.schedule.learning_rate = 4e-4  # peak (wsd, cosine, constant)
    config.schedule.warmup_steps = 2000  # linear from 0; every schedule is multiplied by it
    config.schedule.final_learning_rate = 1e-5  # at the last step (wsd, cosine)
    config.schedule.decay_fraction = 0.1  # of num_steps, the decay phase (wsd)
    # linear | 1-sqrt (wsd)
    config.schedule.decay_shape = "linear"
    # (until this token count, learning rate at its start, at its end) (llada)
    config.schedule.stages = (
        (1.2e12, 4e-4, 4e-4),
        (2.0e12, 1e-4, 1e-4),
        (2.3e12, 1e-4, 1e-5),
    )

    config.mesh = ConfigDict()  # sizes of the mesh axes; one may be -1: all remaining devices
    config.mesh.data = 1  # replicas of the parameters
    config.mesh.fsdp = -1  # parameters, optimizer state and batch are split
    config.mesh.sequence = 1  # positions are split
    config.mesh.tensor = 1  # heads, feed-forward width and vocabulary are split
    config.mesh.expert = 1  # kept for mixture-of-experts layers; splits the batch until then

    # Only runs of several processes read these, except for the last.
    config.distributed = ConfigDict()
    # how long the processes wait for each other at the start
    config.distributed.initialization_timeout_s = 300
    # a process that is not heard for this long is lost, and all others end with status 42
    config.distributed.heartbeat_timeout_s = 100
    # when nothing has happened for this long, print the stacks and end with 42; 0: wait forever
    config.distributed.step_timeout_s = 1800

    config.evaluation = ConfigDict()
    config.evaluation.every_steps = 1000  # 0: never during training
    config.evaluation.num_batches = 8  # of random held-out rows; 0: the whole split
    # of held-out evaluations and samples: raw | ema; auto: the moving average where one is kept
    config.evaluation.weights = AUTO
    config.evaluation.final_num_batches = 256  # after the last step; 0: the whole split

    config.samples = ConfigDict()
    config.samples.every_steps = 0  # 0: never; the texts go to TensorBoard
    config.samples.prompts = ("",)
    config.samples.gen_length = 64
    config.samples.steps = 64
    config.samples.block_length = 64
    config.samples.temperature = 0.0

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # newest checkpoints kept
    # checkpoints at multiples of this are kept forever; 0: none
    config.checkpoint.keep_every_steps = 0
    # on a disk of each host, for frequent copies; "": none
    config.checkpoint.local_directory = ""
    config.checkpoint.local_every_steps = 0  # steps between those copies
    config.checkpoint.restore = ""  # full state of another run: WORKDIR or WORKDIR@STEP
    # weights only: WORKDIR, WORKDIR@STEP, or a Hugging Face directory
    config.checkpoint.init_from = ""
    # raw | ema; auto: the moving average where one is kept
    config.checkpoint.init_from_weights = AUTO

    config.log = ConfigDict()
    config.log.every_steps = 50  # metrics are means over this many steps
    config.log.tensorboard = True
    # that gets the metrics too, with the extra of its name: none | wandb | trackio
    config.log.tracker = "none"
    config.log.profile_at_step = 0  # first step of a profiler window; 0: none
    config.log.profile_num_steps = 5
    # directory or URL; auto: JAX_COMPILATION_CACHE_DIR, else ~/.cache/llada_jax; "": none
    config.log.compilation_cache = AUTO
    config.lock()
    return config


# Knobs that hold one path; data.path may hold several, which parse_sources takes apart.
PATHS = (
    "checkpoint.init_from",
    "checkpoint.local_directory",
    "checkpoint.restore",
    "log.compilation_cache",
)


def load_config(
    path: str, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Returns the validated config of a file, changed by `overrides` such as "seed=3" or
    "optimizer.b2=0.98", and by `values` such as {"optimizer.b2": 0.98}.

    When the config names parts of the user's own, the file's directory becomes importable.

    Raises:
        UserError: the file is missing or fails, a key or a type is wrong, or the knobs contradict
            each other.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"There is no config file {path!r}; pass --config with a Python file that defines "
            "get_config()."
        )
    try:
        with neighbours_importable(file):
            get_config = runpy.run_path(str(file))["get_config"]
            config = get_config()
    # Whatever the user's file raises is the user's to fix; a sys.exit(3) in it must not end the
    # command with a status that means something else.
    except (Exception, SystemExit) as error:
        if isinstance(error, KeyError) and error.args == ("get_config",):
            raise UserError(
                f"{path} defines no get_config(); it must return a changed default_config()."
            ) from error
        raise UserError(f"{path} cannot be used: {_reason(error, file)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} returns a {type(config).__name__}; it must return a changed "
            "default_config()."
        )
    config = completed(config, overrides, values=values or {}, origin=f"get_config() of {path}")
    if own_parts(config):
        add_to_path(file.parent)
    return config


def completed(
    config: ConfigDict,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any],
    origin: str = "the config",
) -> ConfigDict:
    """Returns the validated config with some knobs changed, see `load_config`; messages call it
    by its `origin`.

    Raises:
        UserError: a key or a type is wrong, or the knobs contradict each other.
    """
    config = resolved(config, default_config(), origin=origin)
    names = {group: config[group].name for group in READ_BY}
    for override in overrides:
        apply_override(config, override)
    for path, value in values.items():
        apply_value(config, path, value)
    for knob_path in PATHS:
        group, name = knob_path.split(".")
        config[group][name] = user_path(config[group][name])
    # The file's knobs are for the part that it names. Where an override names another, as for a
    # control experiment, those that this one does not read go back to their defaults; a knob that
    # is itself an override is refused by `validate`.
    overridden = {override.partition("=")[0] for override in overrides} | set(values)
    for group, name in names.items():
        if config[group].name == name:
            continue
        of_own_parts = [] if is_own(config[group].name) else ["arguments"]
        for key in of_own_parts + unread(config, default_config(), group):
            if f"{group}.{key}" not in overridden:
                config[group][key] = default_config()[group][key]
    validate(config, default_config())
    return config


@contextlib.contextmanager
def neighbours_importable(file):
    """Lets a config file import what lies next to it, as Python does for the script that it runs.

    What was imported from there is forgotten at the end: the config of another directory may have a
    neighbour of the same name.
    """
    directory = str(Path(file).resolve().parent)
    before = set(sys.modules)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and str(Path(origin).resolve()).startswith(directory + os.sep):
                del sys.modules[name]


def learning_rate_knob(config: ConfigDict) -> str:
    """Returns the knob that scales the learning rate, as messages name it."""
    is_staged = config.schedule.name == "llada"
    return "the rates in config.schedule.stages" if is_staged else "config.schedule.learning_rate"


def _reason(error: BaseException, file: Path) -> str:
    """Returns what is wrong in a config file, and in which line, as the end of a sentence.

    The messages of ConfigDict fill a screen, so that those that users meet are put in other words.
    """
    where, line = _line_of(error, file)
    # the first argument of these is a number, or the name of an encoding
    is_whole = not error.args or isinstance(error, OSError | UnicodeError)
    text = " ".join(str(error if is_whole else error.args[0]).split())
    unknown = re.match(r"""['"\\]*(?:Key )?['"\\]+(\w+)['"\\]""", text)
    if unknown and isinstance(error, AttributeError | KeyError):
        # as it is written there, so that a knob of another group is not suggested as itself
        written = re.search(rf"(?:\bconfig\.)?((?:\w+\.)*{unknown.group(1)})\b", line)
        path = written.group(1) if written else unknown.group(1)
        return f"{where}the config has no {path!r}.{_meant(path, default_config())}"
    cast = re.fullmatch(
        r"Could not override field '(\w+)' .*?\. (.*) is of original .* to type <class '(.*)'>",
        text,
    )
    if cast:
        kind = cast.group(3).rpartition(".")[2]
        return (
            f"{where}it sets {cast.group(1)} to {cast.group(2)}, which is not of type {kind}; "
            "change it."
        )
    reason = f": {text.rstrip('.')}" if text else ""
    return f"{where}{type(error).__name__}{reason}; fix it there."


def _line_of(error: BaseException, file: Path) -> tuple[str, str]:
    """Returns ("line 7 (its text): ", its text) of the line of a file, or of a file that it
    imports, in which an error arose; two empty texts where it is not known.
    """
    if isinstance(error, SyntaxError) and error.lineno:
        number, text, name = error.lineno, (error.text or "").strip(), error.filename or ""
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if Path(f.filename).resolve() == file.resolve()]
        if not theirs:
            return "", ""
        number, text, name = theirs[-1].lineno or 0, theirs[-1].line or "", str(file)
    there = f" of {Path(name).name}" if Path(name).resolve() != file.resolve() else ""
    return f"line {number}{there} ({text}): ", text


def _meant(path: str, config: ConfigDict) -> str:
    """Returns ' Did you mean ...?' with the knobs that a wrong path may stand for: those of the
    same name in other groups, then one with a similar name in the group, then any similar one.
    """
    known = knobs(config)
    group, _, name = path.rpartition(".")
    same = [other for other in known if other.rpartition(".")[2] == name]
    if same:
        return f" Did you mean {' or '.join(map(repr, same))}?"
    first = path.partition(".")[0]
    groups = [key for key, value in config.items() if isinstance(value, ConfigDict)]
    # without a group a short name, such as lr, is rather an abbreviation of a knob
    is_like_group = difflib.get_close_matches(first, groups, n=1, cutoff=0.75)
    if first not in groups and (group or is_like_group):
        return did_you_mean(first, groups)
    in_group = [other for other in known if other.rpartition(".")[0] == group]
    for candidates, cutoff in ((in_group, 0.5), (known, 0.6)):
        names = [other.rpartition(".")[2] for other in candidates]
        if close := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return f" Did you mean {candidates[names.index(close[0])]!r}?"
    return f" Known: {', '.join([*in_group, *(groups if not group else [])])}."


def apply_override(config: ConfigDict, override: str) -> None:
    """Sets one knob from text such as "optimizer.b2=0.98".

    The type of the default decides how the value is read, and is the type that the knob keeps.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise without_value(f"--config.{override}")
    node, key = _find(config, path, written=f"--config.{path}")
    node[key] = _parse(path, text, like=node[key])


def apply_value(config: ConfigDict, path: str, value: Any) -> None:
    """Sets one knob, such as "optimizer.b2", to a value of the type of its default.

    Raises:
        UserError: there is no such knob, or the value is of another type.
    """
    node, key = _find(config, path, written=repr(path))
    like = node[key]
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(like):
        raise UserError(
            f"{path}={value!r} is not of type {type(like).__name__}; the default is {like!r}."
        )
    node[key] = value


def _find(config: ConfigDict, path: str, *, written: str) -> tuple[ConfigDict, str]:
    """Returns the group of a knob and its key in it; `written` is how the user named it."""
    *groups, key = path.split(".")
    node = config
    for group in groups:
        if not isinstance(node.get(group), ConfigDict):
            known = [k for k, v in node.items() if isinstance(v, ConfigDict)]
            raise UserError(
                f"The config has no group {group!r} (in {written}).{did_you_mean(group, known)}"
            )
        node = node[group]
    if isinstance(node.get(key), ConfigDict):
        raise UserError(
            f"The config has no knob {path!r}, which is a group of knobs; set one of "
            f"{', '.join(knobs(node[key], f'{path}.'))}."
        )
    if key not in node:
        raise UserError(f"The config has no knob {path!r}.{_meant(path, config)}")
    return node, key


def _parse(path: str, text: str, *, like):
    kind = type(like)
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    # these are all the errors that literal_eval documents
    unreadable = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
    try:
        value = ast.literal_eval(text)
    except unreadable:
        value = text
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # people write a number of tokens as 2.3e12
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise UserError(
            f"--config.{path}={text} is not of type {kind.__name__}; the default is {like!r}."
        )
    return value


def own_parts(config: ConfigDict) -> dict[str, str]:
    """Returns {knob: module:attribute} of the parts of the user's own that a config names."""
    return {path: name for path in OWN_PARTS if is_own(name := knob(config, path))}


def parse_sources(path: str) -> tuple[tuple[str, float], ...]:
    """Returns ((directory, weight), ...) of config.data.path: "dir" or "dir_a=0.7,dir_b=0.3"."""
    sources = []
    for part in path.split(","):
        directory, equals, weight = part.strip().rpartition("=")
        # A weight holds no slash: in lr=0.1/data the sign belongs to the path.
        if not equals or "/" in weight:
            directory, weight = part.strip(), "1"
        if not directory:
            raise UserError(
                f"config.data.path={path!r} names no directory; pass --config.data.path=DIR with "
                "one that prepare wrote, or a mixture such as dir_a=0.7,dir_b=0.3."
            )
        try:
            sources.append((user_path(directory), float(weight)))
        except ValueError as error:
            raise UserError(
                f"config.data.path={path!r}: {weight!r} is not a weight; write dir_a=0.7,dir_b=0.3."
            ) from error
    return tuple(sources)
