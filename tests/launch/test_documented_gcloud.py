"""The commands of gcloud in the documents, and what they must agree with the launchers about."""

import re
import shlex

import gke
import pytest
from support.documents import launcher_commands
from support.gcloud import refused_by_gcloud
from support.gke_manifests import pod_of, render
from support.paths import ROOT

from llada_jax.cluster.hardware import machines_named


def documented_gcloud() -> list[list[str]]:
    """Returns the words of every line of docs/ that begins with gcloud."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    lines = [
        line.strip()
        for text in texts
        for line in re.sub(r"\\\n\s*", " ", text).splitlines()
        if line.strip().startswith("gcloud ")
    ]
    return [shlex.split(line, comments=True) for line in lines]


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.slow
def test_the_real_gcloud_knows_every_flag_in_the_documents(tmp_path):
    # the tool would take the word after this flag for its value
    last = {"--recursive"}
    lines = [shlex.join(sorted(words, key=last.__contains__)) for words in documented_gcloud()]
    assert len(lines) >= 15
    wrong = "gcloud container clusters create llada --no-such-flag"
    assert list(refused_by_gcloud([*lines, wrong], tmp_path)) == [wrong]


def test_the_nodes_of_the_example_with_gpus_are_those_that_its_pods_ask_for():
    (pool,) = [words for words in documented_gcloud() if words[2:4] == ["node-pools", "create"]]
    ((flags, command),) = [
        (flags, command) for flags, command in launcher_commands("gke") if "16xh100" in flags
    ]
    gpus = dict(pair.split("=") for pair in flag(pool, "--accelerator").split(","))
    machines = machines_named(flag(flags, "--topology"))
    assert int(flag(pool, "--num-nodes")) == machines.num_hosts
    assert int(gpus["count"]) == machines.chips_per_host
    selected = pod_of(render(*flags, command=command))["spec"]["nodeSelector"]
    assert selected == {"cloud.google.com/gke-accelerator": gpus["type"]}


def test_a_node_selector_of_the_user_replaces_that_of_the_launcher():
    label = "cloud.google.com/gke-accelerator"
    assert pod_of(render("--topology", "h100"))["spec"]["nodeSelector"] == {
        label: gke.ACCELERATORS["h100"].gke_accelerator
    }
    own = render("--topology", "h100", "--node-selector", f"{label}=nvidia-h100-80gb")
    assert pod_of(own)["spec"]["nodeSelector"] == {label: "nvidia-h100-80gb"}
