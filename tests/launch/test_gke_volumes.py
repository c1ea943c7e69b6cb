"""The config that launch/gke.py sends along with a run, and what it needs next to it."""

import contextlib
import io
import subprocess
import sys

import gke
import gke_volumes
import pytest
import yaml
from support.gke_manifests import container_of, pod_of
from support.paths import ROOT
from support.required import library

from llada_jax.errors import UserError

CONFIG = """
from llada_jax.config import default_config
from sizes import WIDTH

def get_config():
    config = default_config()
    config.num_steps = 10
    config.data.path = "/data/corpus"
    config.model.d_model = WIDTH
    config.schedule.name = "gentle:rate"
    return config
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own.py").write_text(CONFIG)
    (tmp_path / "sizes.py").write_text("import numbers_of\nWIDTH = numbers_of.WIDTH\n")
    (tmp_path / "numbers_of.py").write_text("WIDTH = 128\n")
    (tmp_path / "gentle.py").write_text("def rate(**_):\n    return lambda step: 1e-4\n")
    (tmp_path / "unrelated.py").write_text("raise SystemExit\n")
    return tmp_path / "own.py"


def manifests(*flags: str, command: list[str], name: str = "run") -> list[dict]:
    words = ["--name", name, "--image", "image:1", "--topology", "v5p-8", "--dry-run", *flags]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert gke.main([*words, "--gcs-fuse", "b-1:/data:ro", "--", *command]) == 0
    return list(yaml.safe_load_all(out.getvalue()))


def command_with(config, *words: str) -> list[str]:
    return ["llada-jax", "train", "--config", str(config), "--workdir", "gs://b/run", *words]


def test_a_config_is_sent_with_the_files_that_it_needs_and_no_others(config):
    assert set(gke_volumes.files_of(config)) == {
        "own.py",
        "sizes.py",
        "numbers_of.py",
        "gentle.py",
    }


def test_the_pods_read_the_config_where_it_is_mounted(config):
    config_map, jobset = manifests(command=command_with(config))
    container, pod = container_of(jobset), pod_of(jobset)["spec"]
    at = container["command"].index("--config")
    assert container["command"][at + 1] == "/etc/llada_jax/own.py"
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "config"]
    assert mount["mountPath"] == "/etc/llada_jax"
    (volume,) = [v for v in pod["volumes"] if v["name"] == "config"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert config_map["data"]["own.py"] == CONFIG
    library("kubernetes_validate").validate(config_map, "1.35", strict=True)


def test_what_is_sent_is_enough_to_load_the_config(config, tmp_path):
    """In another process and directory, from files that are links, as in a ConfigMap's volume."""
    config_map, _ = manifests(command=command_with(config))
    kept, shown = tmp_path / "there/..2026", tmp_path / "there"
    kept.mkdir(parents=True)
    for name, text in config_map["data"].items():
        (kept / name).write_text(text)
        (shown / name).symlink_to(kept / name)
    code = f"from llada_jax.config import load_config; c = load_config({str(shown / 'own.py')!r})"
    code += "; import gentle; print(c.model.d_model, gentle.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    width, file = done.stdout.split()
    assert width == "128"
    assert file == str(shown / "gentle.py")


def test_a_config_in_the_home_directory_is_sent(config, monkeypatch):
    """No shell expands what follows the = of a flag; the command itself does, and pods have
    another home.
    """
    monkeypatch.setenv("HOME", str(config.parent))
    command = ["llada-jax", "train", "--config=~/own.py", "--workdir", "gs://b/run"]
    config_map, jobset = manifests(command=command)
    assert config_map["data"]["own.py"] == CONFIG
    assert "--config=/etc/llada_jax/own.py" in container_of(jobset)["command"]


def test_of_several_configs_the_one_that_the_command_reads_is_sent(config):
    (config.parent / "old.py").write_text(CONFIG.replace("= 10", "= 20"))
    old = str(config.parent / "old.py")
    config_map, jobset = manifests(command=command_with(old, f"--config={config}"))
    assert "own.py" in config_map["data"]
    assert "old.py" not in config_map["data"]
    assert container_of(jobset)["command"][-1] == "--config=/etc/llada_jax/own.py"


def test_another_config_has_another_name_and_the_same_one_the_same(config):
    names = [manifests(command=command_with(config))[0]["metadata"]["name"] for _ in range(2)]
    config.write_text(CONFIG.replace("= 10", "= 11"))
    changed = manifests(command=command_with(config))[0]["metadata"]["name"]
    assert names[0] == names[1] != changed


def test_own_parts_of_the_command_line_are_sent(config):
    (config.parent / "anneal.py").write_text("def rate(**_):\n    return lambda step: 1e-4\n")
    words = ["--config.schedule.name=anneal:rate"]
    assert "anneal.py" in manifests(command=command_with(config, *words))[0]["data"]


@pytest.mark.parametrize("is_in_the_config", [False, True])
def test_own_parts_that_only_this_machine_finds_are_refused(
    config, is_in_the_config, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "staircase.py").write_text("def rate(**_):\n    return lambda step: 1e-4\n")
    words = ["--config.schedule.name=staircase:rate"]
    if is_in_the_config:
        config.write_text(CONFIG.replace("gentle:rate", "staircase:rate"))
        words = []
    with pytest.raises(UserError, match="staircase.py lies in the current directory"):
        gke_volumes.shipped("run", command_with(config, *words))


def test_a_config_of_the_image_is_left_to_the_image():
    words = ["llada-jax", "train", "--config", "/llada_jax/configs/absent.py", "--workdir", "w"]
    (jobset,) = manifests("--unchecked", command=words)
    assert container_of(jobset)["command"] == words


def test_what_a_config_map_cannot_hold_is_refused(config):
    # in UTF-8, which takes two bytes for the second
    for text in ("x" * 1_000_000, "é" * 500_000):
        (config.parent / "sizes.py").write_text(f"WIDTH = 128\nTABLE = {text!r}\n")
        with pytest.raises(UserError, match="a ConfigMap holds 1,000,000"):
            gke_volumes.files_of(config)
    (config.parent / "sizes.py").unlink()
    (config.parent / "sizes").mkdir()
    (config.parent / "sizes/__init__.py").write_text("WIDTH = 128\n")
    with pytest.raises(UserError, match="the package sizes"):
        gke_volumes.files_of(config)


def test_a_run_is_deleted_with_its_configs(capsys):
    assert gke.main(["--name", "run", "--delete", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kubectl delete jobset run",
        "kubectl delete configmap --selector llada-jax=run",
    ]


@pytest.mark.parametrize("image", ["llada_jax", "host:5000/p/llada_jax", "llada_jax:latest"])
def test_an_image_that_may_change_under_the_run_is_refused(image, capsys):
    words = ["--name", "run", "--image", image, "--topology", "v5p-8", "--dry-run", "--", "true"]
    assert gke.main(words) == 2
    assert "give it a tag of its own" in capsys.readouterr().err


@pytest.mark.parametrize("image", ["host:5000/llada_jax:1", "p/llada_jax@sha256:0123"])
def test_an_image_with_a_tag_or_a_digest_is_taken(image):
    gke.check_image(image)


def test_gpu_pods_find_their_driver_and_do_not_train_on_cpus():
    words = ["--name", "run", "--image", "i:1", "--dry-run", "--topology"]
    for topology in (["h100"], ["h100", "--hosts", "2"], ["16xh100"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert gke.main([*words, *topology, "--", "true"]) == 0
        container = container_of(yaml.safe_load(out.getvalue()))
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert env["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
        assert env["JAX_PLATFORMS"] == "cuda,cpu"
        # as llada_jax/cluster/hardware.py counts the memory of a GPU
        assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def test_gpus_are_named_as_plan_names_them():
    def render(*topology):
        out = io.StringIO()
        words = ["--name", "run", "--image", "i:1", "--dry-run", "--topology", *topology]
        with contextlib.redirect_stdout(out):
            assert gke.main([*words, "--", "true"]) == 0
        return out.getvalue()

    assert render("16xh100") == render("h100", "--hosts", "2")
    assert render("8xh100") == render("h100")


def test_the_root_of_the_checkout_is_where_the_image_has_it():
    assert "WORKDIR /llada_jax" in (ROOT / "launch/Dockerfile").read_text()
