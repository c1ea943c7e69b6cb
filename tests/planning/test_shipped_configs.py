"""The configs of the repository fit the machines that their docstrings name."""

import ast
import json
import shlex

import pytest
from support.configs import CONFIGS
from support.paths import ROOT

from llada_jax.__main__ import main

PLANS = [
    (path.stem, shlex.split(line)[1:])
    for path in CONFIGS
    for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    if line.strip().startswith("llada-jax plan ")
]


def test_the_configs_for_accelerators_each_name_a_machine():
    large = {path.stem for path in CONFIGS if path.stem.startswith(("llada_", "lora_"))}
    large |= {path.stem for path in CONFIGS if path.stem.endswith("_8b")} | {"sft_packed"}
    assert len(large) == 8
    assert {name for name, _ in PLANS} == large


@pytest.mark.parametrize(
    ("name", "words"), PLANS, ids=[f"{name}-{words[-1]}" for name, words in PLANS]
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
