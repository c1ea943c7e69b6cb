"""The configs of the repository fit the machines that their docstrings name."""

import json
import re
import shlex

import pytest
from support.configs import CONFIGS
from support.documents import prose_of
from support.paths import ROOT

from llada_jax.__main__ import main
from llada_jax.cluster.hardware import machines_named
from llada_jax.config import load_config
from llada_jax.sweeps.runs import load_sweep
from llada_jax.verbs.plan import Asked, estimate

PLANS = [
    (path.stem, shlex.split(line)[1:])
    for path in CONFIGS
    for line in re.sub(r"\\\n\s*", " ", prose_of(path)).splitlines()
    if line.strip().startswith("llada-jax plan ")
]


def test_the_configs_for_accelerators_each_name_a_machine():
    large = {path.stem for path in CONFIGS if path.stem.startswith(("llada_", "lora_"))}
    large |= {path.stem for path in CONFIGS if path.stem.endswith("_8b")}
    large |= {"sft_packed", "ladder"}
    assert len(large) == 9
    assert {name for name, _ in PLANS} == large


@pytest.mark.parametrize(
    ("name", "words"), PLANS, ids=[f"{n}-{w[w.index('--topology') + 1]}" for n, w in PLANS]
)
def test_a_config_fits_the_machine_that_its_docstring_names(name, words, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert f"configs/{name}.py" in words
    assert main([*words, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["memory"]["peak"] < report["usable_bytes"]


def test_the_whole_batch_of_the_160m_model_at_once_would_not_fit(capfd, monkeypatch):
    # so the comparison above can fail
    monkeypatch.chdir(ROOT)
    words = next(words for name, words in PLANS if name == "llada_160m")
    main([*words, "--json", "--config.optimizer.gradient_accumulation=1"])
    report = json.loads(capfd.readouterr().out)
    assert report["memory"]["peak"] > report["usable_bytes"]


def test_the_ladder_names_its_largest_network_and_all_its_runs_fit_the_same_machine():
    (words,) = [words for name, words in PLANS if name == "ladder"]
    machines = machines_named(words[words.index("--topology") + 1])
    vocab_size = int(words[words.index("--vocab-size") + 1])
    sweep = load_sweep(str(ROOT / "configs" / "ladder.py"), [], "/nowhere")
    reports = [estimate(Asked(run.config, machines, 1, vocab_size)) for run in sweep.runs]
    for report in reports:
        assert report["memory"]["peak"] < report["usable_bytes"]
    sizes = [report["parameters"] for report in reports]
    largest = sweep.runs[sizes.index(max(sizes))].config.model
    knobs = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
    named = load_config(sweep.file, knobs).model
    assert named.to_dict() == largest.to_dict()
    (found,) = re.findall(r"([\d,]+) to ([\d,]+) GPU-hours", prose_of(ROOT / "configs/ladder.py"))
    hours = [sum(report["chip_hours"][case] for report in reports) for case in ("fast", "slow")]
    assert [int(number.replace(",", "")) for number in found] == [round(n, -1) for n in hours]
