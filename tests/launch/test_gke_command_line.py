"""Which command lines launch/gke.py accepts, and how it refuses the others."""

import os

import gke
import pytest
from support.documents import launcher_commands
from support.gke_manifests import render

from llada_jax.cluster.hardware import ACCELERATORS


def test_names_are_refused_when_the_names_of_pods_would_exceed_63_characters():
    # JobSet names its pods NAME-slice-job-SLICE-HOST-xxxxx
    flags = ["--topology", "v6e-256", "--slices", "11"]
    longest = 63 - len("-slice-job-10-63-abcde")
    assert render(*flags, name="a" * longest)["metadata"]["name"] == "a" * longest
    assert (
        gke.main(
            ["--name", "a" * (longest + 1), "--image", "i:1", *flags, "--dry-run", "--", "true"]
        )
        == 2
    )


@pytest.mark.parametrize("words", [["--name=--all"], ["--name=a", "--namespace=--all-namespaces"]])
@pytest.mark.parametrize("action", ["--delete", "--follow"])
def test_a_name_that_kubectl_would_take_for_a_flag_is_refused(words, action, capsys):
    assert gke.main([*words, action, "--dry-run"]) == 2
    assert "must consist of lower-case letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "Run", "--topology", "v5p-8"], "lower-case"),
        (["--name", "1run", "--topology", "v5p-8"], "begin with a letter"),
        (["--name", "run-", "--topology", "v5p-8"], "not end with a hyphen"),
        (["--name", "a" * 60, "--topology", "v5p-8"], "shorten it by"),
        (["--topology", "v5p-9"], "v5p-8"),
        (["--topology", "h100", "--slices", "2"], "--hosts 2"),
        (["--topology", "h100", "--hosts", "0"], "--hosts 0 must be at least 1."),
        (["--topology", "h100", "--hosts", "-2"], "--hosts -2 must be at least 1."),
        (["--topology", "v5p-8", "--hosts", "2"], "--hosts is for the name of a GPU"),
        (["--topology", "12xh100"], "choose a multiple of 8"),
        (["--topology", "4xh100"], "write 8xh100"),
        (["--topology", "16xh100", "--slices", "2"], "write 32xh100"),
        (["--topology", "h100-pcie"], "choose one of"),
        (["--topology", "v5p-8", "--capacity", "reservation"], "reservation:NAME"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket"], "BUCKET:/path"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket:/dev/shm"], "same place"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket:/dev//shm/"], "same place"),
        (["--topology", "v5p-8", "--gcs-fuse", "bucket://"], "--gcs-fuse bucket:// must be an abs"),
        (["--topology", "v5p-8", "--ramdisk", "local"], "--ramdisk local must be an absolute path"),
        (["--topology", "v5p-8", "--ramdisk", "/"], "--ramdisk / must be an absolute path below /"),
        (["--topology", "v5p-8", "--ramdisk", "/a/.."], "below / and without a colon"),
        (["--topology", "v5p-8", "--ramdisk", "/a:b"], "such as --ramdisk /local."),
        (["--topology", "v5p-8", "--max-restarts", "-1"], "at least 0"),
        (["--topology", "v5p-8", "--flags", "gpu"], "which the compiler for TPUs does not read"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(flags, message, capsys):
    name = [] if "--name" in flags else ["--name", "run"]
    assert gke.main([*name, "--image", "i:1", *flags, "--dry-run", "--", "true"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "A"], "'A' must be KEY=VALUE"),
        (["--env", "a-b=1"], "'a-b' cannot be the name of an environment variable"),
        (["--capacity", "spot:8h"], "'spot:8h' must be one of"),
        (["--flags", "v6"], "Did you mean 'v6e'?"),
    ],
)
def test_a_value_that_means_nothing_is_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        gke.main(["--name", "run", *words, "--", "true"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("image", "--image"), ("command", "no command"), ("topology", "--topology")],
)
def test_a_missing_flag_or_command_is_named(left_out, message, capsys):
    words = {
        "image": ["--image", "i:1"],
        "topology": ["--topology", "v5p-8"],
        "command": ["--", "true"],
    }
    assert (
        gke.main(
            ["--name", "run", *sum((given for key, given in words.items() if key != left_out), [])]
        )
        == 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [name for name, chip in ACCELERATORS.items() if chip.platform == "gpu"]
)
def test_a_gpu_is_accepted_exactly_when_gke_offers_it(name, capsys):
    status = gke.main(
        ["--name", "run", "--image", "i:1", "--topology", name, "--dry-run", "--", "true"]
    )
    assert status == (0 if ACCELERATORS[name].gke_accelerator else 2)
    assert ("gke-accelerator" in capsys.readouterr().out) == (status == 0)


@pytest.mark.parametrize(("topology", "extra"), [("v5p-8", "tpu"), ("h100", "cuda")])
def test_an_extra_that_the_image_lacks_is_refused_with_the_argument_that_adds_it(
    topology, extra, capsys
):
    words = ["--name", "run", "--image", "i:1", "--topology", topology, "--dry-run", "--"]
    command = "llada-jax evaluate --checkpoint gs://bucket/run --tasks gsm8k"
    assert gke.main([*words, *command.split()]) == 2
    assert f"an image with --build-arg EXTRA={extra},eval and" in capsys.readouterr().err


def test_a_run_cannot_live_on_the_ram_disk_of_a_node(capsys):
    words = ["--name", "run", "--image", "i:1", "--topology", "v5p-16", "--ramdisk", "/local"]
    command = "llada-jax evaluate --checkpoint /local/run --data gs://bucket/data"
    assert gke.main([*words, "--dry-run", "--", *command.split()]) == 2
    assert (
        "--checkpoint /local/run is not on a disk that the hosts share" in capsys.readouterr().err
    )


def test_a_dry_run_needs_no_kubectl(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--name", "run", "--image", "i:1", "--topology", "v5p-8"]
    assert gke.main([*words, "--", "true"]) == 2
    assert "kubectl is not installed here" in capsys.readouterr().err
    assert gke.main([*words, "--dry-run", "--", "true"]) == 0


def test_a_kubectl_that_fails_once_is_a_failure(tmp_path, monkeypatch):
    """`--delete` calls it for the JobSet and for its config; the manifests are sent to `apply`."""
    (tmp_path / "kubectl").write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n'
        'case "$*" in *"delete jobset"*|*apply*) exit 5 ;; esac\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["--name", "run", "--namespace", "team", "--image", "i:1", "--topology", "v5p-8"]
    assert gke.main([*words, "--delete"]) == 5
    assert gke.main([*words, "--follow"]) == 0
    assert gke.main([*words, "--", "true"]) == 5
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--namespace team delete jobset run",
        "--namespace team delete configmap --selector llada-jax=run",
        "--namespace team logs --follow --prefix --container trainer --max-log-requests 10000 "
        "--tail -1 --selector jobset.sigs.k8s.io/jobset-name=run",
        "--namespace team apply -f -",
    ]


def test_every_command_of_the_documents_is_accepted(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    commands = launcher_commands("gke")
    assert len(commands) >= 4
    for flags, command in commands:
        assert gke.main([*flags, "--dry-run", *(["--", *command] if command else [])]) == 0
