"""Runs lm-evaluation-harness on local tasks with a checkpoint; prints what the test compares.

python local_tasks.py CHECKPOINT DIRECTORY

As one of several processes of a run (JAX_NUM_PROCESSES), on a mesh of the devices of all.
"""

import contextlib
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import jax
import lm_eval
import yaml
from lm_eval.api.instance import Instance

import llada_jax
from llada_jax.__main__ import main
from llada_jax.cluster import distributed
from llada_jax.cluster.sharding import make_mesh
from llada_jax.errors import UserError
from llada_jax.evaluation import harness, harness_tasks
from llada_jax.evaluation.harness import HarnessModel, run
from llada_jax.evaluation.presets import PRESETS, Setting

CHECKPOINT, HOME = sys.argv[1], Path(sys.argv[2])

ROWS = [
    {"q": "Ada", "choices": ["first", "last", "lost"], "gold": 0},
    {"q": "Bob was", "choices": ["away", "at home"], "gold": 1},
    {"q": "Eve", "choices": ["went", "a longer answer"], "gold": 1},
]


def task(name: str, **config) -> dict:
    file = HOME / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        **config,
    }


def mean(metric: str) -> dict:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


RANKED = task(
    "ranked",
    output_type="multiple_choice",
    doc_to_choice="{{choices}}",
    doc_to_target="{{gold}}",
    metric_list=[mean("acc"), mean("acc_norm")],
)
ROLLED = task(
    "rolled",
    output_type="loglikelihood_rolling",
    doc_to_target="{{q}} " + "is a truth " * 6,
    metric_list=[{"metric": "bits_per_byte"}],
)
ROLLED["doc_to_text"] = ""
WRITTEN = task(
    "written",
    output_type="generate_until",
    doc_to_target="{{choices[gold]}}",
    generation_kwargs={"until": ["D"], "max_gen_toks": 8},
    metric_list=[mean("exact_match")],
)

mesh = None
if "JAX_NUM_PROCESSES" in os.environ:
    distributed.initialize()
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
pretrained = llada_jax.load(CHECKPOINT, mesh=mesh)
model = HarnessModel(pretrained, mc_samples=4, batch_size=4, block_length=4, seed=3)
found = run(model, [RANKED, ROLLED, WRITTEN], bootstrap_iters=0)

chats = HarnessModel(
    pretrained,
    mc_samples=4,
    seed=3,
    chat_template="{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
)
chatted = run(chats, [RANKED], apply_chat_template=True, bootstrap_iters=0)

answers = {
    (sample["doc"]["q"], tuple(arguments)): response[0][0]
    for sample in found["samples"]["ranked"]
    for arguments, response in zip(sample["arguments"], sample["resps"])
}
cached = HarnessModel(pretrained, mc_samples=4, seed=3)
cache = str(HOME / "cache")
first = run(cached, [RANKED], use_cache=cache, bootstrap_iters=0)
cached = HarnessModel(pretrained, mc_samples=4, seed=3)
cached._scores = None  # whatever is asked again fails
again = run(cached, [RANKED], use_cache=cache, bootstrap_iters=0)
# other noise, and the same requests
other = run(
    HarnessModel(pretrained, mc_samples=4, seed=4), [RANKED], use_cache=cache, bootstrap_iters=0
)


def scores_of(results: dict) -> list:
    return [sample["resps"] for sample in results["samples"]["ranked"]]


@patch.object(harness, "CACHED_TOGETHER", 2)
def interrupted() -> dict:
    """Returns how many answers are scored in an evaluation that stops in its second part, and in
    the one that continues it.
    """
    asked = []

    def scoring(least: int) -> HarnessModel:
        model = HarnessModel(pretrained, mc_samples=4, seed=3)
        scores = model._scores

        def counted(questions):
            if len(asked) >= least:
                raise InterruptedError
            asked.extend(questions)
            return scores(questions)

        model._scores = counted
        return model

    stopped = scoring(2)
    with contextlib.suppress(InterruptedError):
        run(stopped, [RANKED], use_cache=str(HOME / "stopped"), bootstrap_iters=0)
    stopped.cache_hook.dbdict.close()  # as the end of a process does
    num_before = len(asked)
    results = run(scoring(99), [RANKED], use_cache=str(HOME / "stopped"), bootstrap_iters=0)
    return {
        "before": num_before,
        "after": len(asked) - num_before,
        "is_same": results["results"]["ranked"]["acc,none"]
        == first["results"]["ranked"]["acc,none"],
    }


refused = ""
if mesh is not None:
    own = Instance("loglikelihood", {}, ("Ada", f" {jax.process_index()}"), 0)
    try:
        model.loglikelihood([own])
    except UserError as error:
        refused = str(error)


def said(*words: str) -> dict:
    """Returns the status, the output and the messages of `evaluate` with these words."""
    out, err = io.StringIO(), io.StringIO()
    flags = ("--checkpoint", CHECKPOINT, "--seed", "3", "--batch-size", "4", *words)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["evaluate", *flags])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def verbs() -> dict:
    """Evaluates from the command line: tasks in files, in groups of groups, and of a preset."""
    folder = HOME / "yaml"
    folder.mkdir()
    groups = [{"group": "inner", "task": ["ranked"]}, {"group": "outer", "task": ["inner"]}]
    unsafe = {**WRITTEN, "task": "unsafe", "unsafe_code": True}
    for config in (RANKED, ROLLED, unsafe, *groups):
        name = config.get("group", config["task"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    # without the tasks that the harness comes with, which take half a minute to read
    only_ours = partial(lm_eval.tasks.TaskManager, include_path=str(folder), include_defaults=False)
    harness_tasks.require = lambda name, extra: SimpleNamespace(TaskManager=lambda **_: only_ours())
    setting = Setting(0, mc_samples=4, score=50.0)
    PRESETS["local"] = ("these checks", {"ranked": setting, "unsafe": setting})
    few = ("--harness", "bootstrap_iters=2")
    confirmed = ("--harness", "confirm_run_unsafe_code=yes")
    return {
        "named": said("--tasks", "outer", "--mc-samples", "4", *few, "--json"),
        "preset": said("--preset", "local", "--tasks", "ranked", *few),
        "unsafe": said("--preset", "local"),
        "unknown": said("--tasks", "rankled"),
        "too few": said("--tasks", "ranked", "--harness", "num_fewshot=9"),
        "unbounded": said("--tasks", "rolled", "--estimator", "confidence_order"),
        "confirmed": said("--tasks", "unsafe", *confirmed, "--json"),
    }


print(
    json.dumps(
        {
            "interrupted": None if mesh is not None else interrupted(),
            "verbs": None if mesh is not None else verbs(),
            "results": found["results"],
            "answers": [[*arguments, value] for (_, arguments), value in answers.items()],
            "rolled": [sample["resps"][0][0] for sample in found["samples"]["rolled"]],
            "written": [
                [sample["arguments"][0][0], sample["resps"][0][0]]
                for sample in found["samples"]["written"]
            ],
            "prompt_of_chat": chatted["samples"]["ranked"][0]["arguments"][0][0],
            "refused": refused,
            "again": scores_of(first) == scores_of(again),
            "error_again": again["results"]["ranked"]["acc_mc_stderr,none"],
            "is_other": scores_of(first) != scores_of(other),
        },
        default=str,
    )
)
