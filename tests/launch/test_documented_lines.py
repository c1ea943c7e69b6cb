"""Every line for a launcher in the documents, up to the first device of its first host.

The variables and the packages are those that the launcher renders; nothing is rented.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cloud
import pytest
import slurm
from preflight import check
from support import documents
from support.documents import commands, launcher_commands, prose_of
from support.hosts import Start, extras_of_the_image, on_gke, on_slurm, on_tpu_vm
from support.paths import ROOT

from llada_jax.__main__ import main
from llada_jax.cluster.hardware import machines_named
from llada_jax.sweeps import runs, targets
from llada_jax.sweeps.attempts import train_command
from llada_jax.verbs.sweep import make_parser

RENDERED = {"gke": on_gke, "tpu_vm": on_tpu_vm, "slurm": on_slurm}


class Line(NamedTuple):
    """A line of the documents: a launcher, its flags, and the command that it runs."""

    launcher: str
    flags: list[str]
    command: list[str]

    @property
    def platforms(self) -> str:
        """What JAX is asked for on its hosts; "" where that is left to the machine."""
        if self.launcher == "slurm":
            return "cuda,cpu" if self.gpus_per_node else ""
        return "cuda,cpu" if "xh100" in self.topology else "tpu,cpu"

    @property
    def topology(self) -> str:
        return self.flags[self.flags.index("--topology") + 1]

    @property
    def gpus_per_node(self) -> int:
        return slurm.parse([*self.flags, "--", *self.command])[0].gpus_per_node

    @property
    def num_processes(self) -> int:
        """Processes that the launcher itself joins to a run; those of TPUs find each other."""
        if self.launcher == "slurm":
            args, _ = slurm.parse([*self.flags, "--", *self.command])
            return args.nodes * args.tasks_per_node
        return machines_named(self.topology).num_hosts if self.platforms == "cuda,cpu" else 1


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def handed_over(monkeypatch, words: list[str]) -> list[Line]:
    """Returns what `llada-jax sweep ... --run` hands to a launcher where no run has begun yet."""
    calls = []

    def record(call, **_):
        calls.append(call[1:])
        return subprocess.CompletedProcess(call, 0)

    with monkeypatch.context() as patched:
        patched.setattr(targets.subprocess, "run", record)
        # a workdir in a bucket, which is not asked
        patched.setattr(targets, "unfinished", lambda sweep: sweep.runs)
        patched.setattr(runs, "read_sweep_json", lambda workdir: None)
        cut = words.index("--")
        assert main([*words[:cut], "--dry-run", *words[cut:]]) == 0
    lines = []
    for script, *flags in calls:
        flags.remove("--dry-run")
        cut = flags.index("--")
        lines.append(Line(Path(script).stem, flags[:cut], flags[cut + 1 :]))
    return lines


def documented_sweeps() -> list[list[str]]:
    """Returns the words of every `llada-jax sweep ... --run gke` or `slurm` that is shown whole."""
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
    found = [words for file in files for words in commands(prose_of(file)) if "--run" in words]
    return [words for words in found if words[words.index("--run") + 1] in ("gke", "slurm")]


def documented(monkeypatch) -> list[Line]:
    """Returns every line; of the runs of a sweep the first and the last."""
    lines = [
        Line(launcher, flags, command)
        for launcher in RENDERED
        for flags, command in launcher_commands(launcher)
        if command
    ]
    for words in documented_sweeps():
        first, *_, last = [*handed_over(monkeypatch, words)] * 2
        lines += [first, last] if first != last else [first]
    return lines


def start_of(line: Line, directory: Path) -> Start:
    directory.mkdir()
    return RENDERED[line.launcher](line.flags, line.command, directory)


def test_the_documents_show_every_launcher_on_every_kind_of_chip_and_its_sweeps(monkeypatch):
    shown = {(line.launcher, line.platforms, line.command[1]) for line in documented(monkeypatch)}
    assert shown == {
        ("gke", "tpu,cpu", "train"),
        ("gke", "cuda,cpu", "train"),
        ("gke", "tpu,cpu", "sweep"),
        ("tpu_vm", "tpu,cpu", "train"),
        ("slurm", "cuda,cpu", "train"),
        ("slurm", "cuda,cpu", "sweep"),
        ("slurm", "", "train"),
    }


def test_lines_are_looked_for_in_the_readme_the_pages_and_the_configs(tmp_path, monkeypatch):
    texts = {
        "README.md": "{}",
        "docs/page.md": "text\n\n{}",
        "configs/own.py": '"""Own.\n\n{}\n"""\n',
    }
    for number, (name, text) in enumerate(texts.items()):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            text.format(f"    python launch/gke.py --slices {number} -- llada-jax train")
        )
    before = launcher_commands("gke")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    found = [line for line in launcher_commands("gke") if line not in before]
    assert found == [(["--slices", str(number)], ["llada-jax", "train"]) for number in range(3)]


def test_the_image_and_the_tpu_vms_have_the_same_extras():
    assert extras_of_the_image() == cloud.HOST_EXTRAS


@pytest.mark.slow
def test_a_launcher_sets_what_its_hosts_need(monkeypatch, tmp_path):
    for number, line in enumerate(documented(monkeypatch)):
        start = start_of(line, tmp_path / str(number))
        given = start.variables
        assert given.get("JAX_PLATFORMS", "") == line.platforms
        place = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
        assert place & set(given) == (place if line.num_processes > 1 else set())
        if line.platforms == "tpu,cpu":
            assert given["JAX_COORDINATOR_PORT"] == str(cloud.COORDINATOR_PORT)
            assert start.extras[0] == "tpu"
        if line.platforms == "cuda,cpu":
            # one that drives all GPUs of a machine finds them by itself
            assert ("JAX_LOCAL_DEVICE_IDS" in given) == (line.num_processes > 1)
            assert start.extras[0] == "cuda"
        if line.launcher == "gke" and line.platforms == "cuda,cpu":
            assert given["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
            assert given["JAX_NUM_PROCESSES"] == str(line.num_processes)


@pytest.mark.slow
def test_the_commands_for_slurm_can_run_where_such_disks_are(monkeypatch):
    for line in documented(monkeypatch):
        if line.launcher == "slurm":
            args, command = slurm.parse([*line.flags, "--", *line.command])
            place = dataclasses.replace(
                slurm.place_of(args),
                shares_disks=False,
                has_own_disks=True,
                mounts={"runs": True, "data": False},
            )
            words = [word.replace(slurm.INDEX, "0") for word in command]
            assert "can run there" in check(words, place)


# Runs commands with nothing but the packages that the extras bring, up to the first device. The
# other processes of a run are not there, and so joining them is only said.
ON_A_HOST = """
import json, re, sys
from importlib import metadata

import llada_jax.__main__

extras, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
names = metadata.packages_distributions()


def closure(wanted):
    # {distribution}, from the requirements that hold for the extras
    found, waiting = set(), [("llada_jax", frozenset(wanted))]
    seen = set()
    while waiting:
        name, chosen = waiting.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # such as libtpu, which this machine does not have
        found.add(re.sub(r"[-_.]+", "-", name).lower())
        for line in required:
            head, _, marker = line.partition(";")
            matches = re.match(r"\\s*([\\w.-]+)\\s*(?:\\[([^]]*)\\])?", head)
            extra = re.search(r"extra\\s*==\\s*['\\"]([^'\\"]+)", marker)
            if extra and extra[1].replace("_", "-") not in {e.replace("_", "-") for e in chosen}:
                continue
            inner = frozenset((matches[2] or "").replace(" ", "").split(",")) - {""}
            waiting.append((matches[1], inner))
    return found


there = closure(extras)


class OnlyWhatIsInstalledThere:
    def find_spec(self, name, path=None, target=None):
        owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in names.get(name, [])}
        if owners and not owners & there:
            raise ModuleNotFoundError(f"the hosts have no {name}", name=name)


sys.meta_path.insert(0, OnlyWhatIsInstalledThere())
assert "torch" not in there and ("gcsfs" in there) == ("gs" in extras)
if "gs" in extras:
    import gcsfs, s3fs  # the paths of the command
import jax

jax.distributed.initialize = lambda **place: print("joins", place["num_processes"])
for words in commands:
    print("ends", llada_jax.__main__.main(words))
"""


def trained_by(words: list[str]) -> list[str]:
    """Returns the words of `train`, which a task of a sweep starts for its run."""
    if words[0] != "sweep":
        return words
    args, overrides = make_parser().parse_with_overrides(words[1:])
    sweep = runs.load_sweep(args.config, overrides, args.workdir)
    return train_command(sweep, sweep.runs[args.index])[3:]


def run_up_to_the_first_device(variables: dict, extras: tuple, all_words: list) -> list[str]:
    """Returns what each command says last, and asserts that all end with status 2."""
    # Where the launcher leaves the platform to the machine, this one has none.
    environment = {"JAX_PLATFORMS": "absent", "TPU_SKIP_MDS_QUERY": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_HOST, json.dumps(extras), json.dumps(all_words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | variables,
    )
    assert done.returncode == 0, done.stderr
    num_processes = variables.get("JAX_NUM_PROCESSES")
    each = [*(["joins", num_processes] if num_processes else []), "ends", "2"]
    assert done.stdout.split() == each * len(all_words), done.stderr
    return re.findall(r"^llada-jax: (.*)$", done.stderr, flags=re.MULTILINE)


@pytest.mark.slow
def test_documented_commands_run_up_to_the_first_device(monkeypatch, tmp_path):
    """The first question for a device is where each command ends: this machine has neither TPUs nor
    GPUs. Of a sweep, that is the command which its task starts.
    """
    monkeypatch.setattr(runs, "read_sweep_json", lambda workdir: None)  # may be in a bucket
    together: dict[str, list[Start]] = {}
    for number, line in enumerate(documented(monkeypatch)):
        start = start_of(line, tmp_path / str(number))
        together.setdefault(repr((line.platforms, start.variables, start.extras)), []).append(start)
    for starts in together.values():
        variables, extras = starts[0].variables, starts[0].extras
        all_words = sorted({tuple(trained_by(start.words)) for start in starts})
        said = run_up_to_the_first_device(variables, extras, all_words)
        platforms = variables.get("JAX_PLATFORMS", "absent")
        first = platforms.partition(",")[0]
        ends = [f"JAX finds no devices (Unable to initialize backend '{first}'"]
        if first == "cuda":
            ends.append(f"JAX_PLATFORMS='{platforms}' names GPUs first, and JAX sees none")
        assert len(said) == len(all_words)
        assert all(sentence.startswith(tuple(ends)) for sentence in said), said
