"""Tasks of lm-evaluation-harness: how they are loaded and asked, and the error that the Monte Carlo
adds to their metrics.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llada_jax.errors import UserError, look_up, reason, require
from llada_jax.evaluation.rolling import check_can_bound
from llada_jax.ranges import MAX_SIZE, SIZE, SIZE_OR_NONE, Range, check_number
from llada_jax.samplers.settings import check_options, check_schedule, check_strengths

# How often the scores are perturbed for the error of the Monte Carlo.
NUM_PERTURBATIONS = 64


# ---- settings


def is_yes(word: str) -> bool:
    """Whether the value of a KEY=VALUE switches something on."""
    return word.lower() in ("1", "true", "yes")


# What may be written KEY=VALUE, and how a value is read: for `run`, and for HarnessModel.
OF_RUN: dict[str, Callable] = {
    "num_fewshot": int,
    "limit": float,
    "include_path": str,
    "use_cache": str,
    "apply_chat_template": is_yes,
    "system_instruction": str,
    "bootstrap_iters": int,
    "confirm_run_unsafe_code": is_yes,
}
OF_MODEL: dict[str, Callable] = {
    "gen_length": int,
    "block_length": int,
    "steps": int,
    "remasking": str,
    "commit": str,
    "revise": str,
    "append": is_yes,
    "lookahead": int,
    "eos": str,
    "cache": str,
    "refresh": int,
}
# Of the numbers for `run`; the harness answers others with a traceback.
RANGES = {
    "num_fewshot": SIZE_OR_NONE,
    "limit": Range(0, MAX_SIZE, above=True),
    "bootstrap_iters": SIZE_OR_NONE,
}


def read_settings(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of `run` and of HarnessModel that KEY=VALUE words name.

    Raises:
        UserError: a word is not a pair, its value is not a number of its range where one is needed,
            or the settings of the sampler do not fit together.
    """
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--harness {word!r} has no value; write {word}=VALUE.")
        read = look_up({**OF_RUN, **OF_MODEL}, key, "setting of the harness")
        try:
            settings[key] = read(value)
        except ValueError:
            raise UserError(f"--harness {key}={value!r} must be a number.") from None
        if key in RANGES:
            check_number(f"--harness {key}=", settings[key], RANGES[key])
    of_model = {key: value for key, value in settings.items() if key in OF_MODEL}
    check_sampling(**of_model)
    return {key: value for key, value in settings.items() if key in OF_RUN}, of_model


def check_sampling(
    *,
    gen_length: int | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    cfg_scale: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **options: Any,
) -> None:
    """Raises UserError for settings of generated texts that are unknown, out of range or do not fit
    together.

    Without a gen_length, the length of a text is that of a task, and with it how blocks and steps
    divide it. What top_k and top_p are good for depends on the temperature, which is the task's.
    """
    for name, size in (
        ("gen_length", gen_length),
        ("block_length", block_length),
        ("steps", steps),
    ):
        if size is not None:
            check_number(f"{name}=", size, SIZE)
    check_strengths(cfg_scale=cfg_scale)
    if gen_length is not None:
        check_schedule(
            gen_length=gen_length,
            block_length=gen_length if block_length is None else block_length,
            steps=gen_length if steps is None else steps,
            temperature=0.0,
            cfg_scale=cfg_scale,
        )
    # top_k and top_p need a temperature, which is the task's
    check_options(temperature=1.0, top_k=top_k, top_p=top_p, **options)


# ---- tasks


def load_tasks(
    tasks: Sequence[Any], *, include_path: str | None = None, confirm_run_unsafe_code: bool = False
) -> list[list[Any]]:
    """Returns for each of `tasks` the harness's own objects, with their data, which `run` takes as
    tasks: a task, a group of tasks, or all tasks of a tag.

    A task of another library may lack its data or a package, or may run code that the model wrote.
    All of that is found here, so that it need not end an evaluation that has taken hours.

    Args:
        tasks: names, configs of tasks as dicts, or what this function has returned.
        include_path: a folder with YAML files of tasks.
        confirm_run_unsafe_code: accept tasks that run what the model wrote.

    Raises:
        UserError: a task cannot be loaded, or runs code without confirmation.
    """
    # The harness reads thousands of files, for half a minute, to know the tasks that it comes with.
    has_names = any(isinstance(task, str) for task in tasks)
    manager = require("lm_eval.tasks", extra="eval").TaskManager(
        include_path=include_path, include_defaults=has_names
    )
    found = []
    for task in tasks:
        name = task.get("task") if isinstance(task, dict) else task
        try:
            # loading changes a config
            loaded = manager.load([copy.deepcopy(task) if isinstance(task, dict) else task])
        except Exception as error:
            # tasks come with code of their own, which raises what it likes
            raise UserError(
                f"The task {name} of lm-evaluation-harness cannot be loaded ({reason(error)}); "
                "fix that, or leave the task out."
            ) from error
        for part, one in loaded["tasks"].items():
            if getattr(one, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
                raise UserError(
                    f"The task {part} runs code on this machine that the model has written; add "
                    "--harness confirm_run_unsafe_code=true to accept that, or leave the task out."
                )
        inner = {child for children in loaded["group_map"].values() for child in children}
        outer = [group for group in loaded["groups"].values() if group.name not in inner]
        found.append(outer or list(loaded["tasks"].values()))
    return found


def check_estimator(tasks: Sequence[Any], estimator: str) -> None:
    """Raises UserError for a task that bounds whole texts with an estimator that is not a bound.

    Args:
        tasks: objects of the harness, see `load_tasks`.
    """
    for task in tasks:
        for one in task.get_all_tasks() if hasattr(task, "get_all_tasks") else (task,):
            if one.OUTPUT_TYPE == "loglikelihood_rolling":
                check_can_bound(estimator, f"the task {one.task_name} asks for bounds of texts")


@contextlib.contextmanager
def asking(model: Any, tasks: Sequence[Any]) -> Iterator[None]:
    """Turns what the harness raises in its block before it asks the model into a UserError. What it
    raises later may be a fault of the model or of the devices.

    Args:
        model: HarnessModel. tasks: objects of the harness, see `load_tasks`.
    """
    model.is_asked = False
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tasks come with code of their own, which raises what it likes
        if model.is_asked:
            raise
        names = [str(getattr(task, "task_name", getattr(task, "name", ""))) for task in tasks]
        raise UserError(
            f"lm-evaluation-harness fails on {', '.join(names)} before it asks the model "
            f"({reason(error)}); fix the task, its data or the setting that this is about (more "
            "num_fewshot than documents, a use_cache that cannot be written), or leave it out."
        ) from error


def monte_carlo_errors(task: Any, samples: Sequence[dict], standard_errors: dict) -> dict:
    """Returns {(metric, filter): the error that the Monte Carlo adds to it}; see `run`.

    All of them are nan where the error of a score is not known: it comes from the cache of the
    harness, which keeps no errors, or was drawn once.
    """
    asked = [arguments for sample in samples for arguments in sample["arguments"]]
    is_known = all(math.isfinite(standard_errors.get(arguments, math.nan)) for arguments in asked)
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str], list[float]] = {}
    aggregation = task.aggregation()
    for _ in range(NUM_PERTURBATIONS if is_known else 1):
        items: dict[tuple[str, str], list] = {}
        for sample in samples:
            perturbed = []
            for arguments, response in zip(
                sample["arguments"], sample["filtered_resps"], strict=True
            ):
                shift = standard_errors[arguments] * rng.normal() if is_known else 0.0
                if isinstance(response, (tuple, list)):
                    perturbed.append((response[0] + shift, *response[1:]))
                else:
                    perturbed.append(response + shift)
            with contextlib.redirect_stdout(None):
                metrics = task.process_results(sample["doc"], perturbed)
            for metric, item in metrics.items():
                items.setdefault((metric, sample["filter"]), []).append(item)
        for key, values in items.items():
            found.setdefault(key, []).append(float(aggregation[key[0]](values)))
    return {key: float(np.std(values)) if is_known else math.nan for key, values in found.items()}
