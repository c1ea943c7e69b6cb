"""What the launchers find out about the mesh and the paths of every verb, before they rent."""

import pytest
from preflight import Place, check
from support.paths import ROOT

from llada_jax.cluster.hardware import machines_named
from llada_jax.errors import UserError

PLACE = Place(
    machines=machines_named("v5p-128"),
    mounts={"/data": False, "/runs": True},
    extras=("data", "gs", "hf"),
    how_to_install="install {extra}",
)
TRAIN = "train --config configs/llada_8b.py"
EVALUATE, SAMPLE = "evaluate --checkpoint /runs/a", "sample --checkpoint /runs/a"
IMPORT = "import --from GSAI-ML/LLaDA-8B-Base --output gs://b/llada"
EXPORT = "export --checkpoint /runs/a --output"
PREPARE = "prepare --sequence-length 64 --output /runs/corpus"
NOT_SHARED = "is not on a disk that the hosts share"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{EVALUATE} --data /data/c --mesh fsdp=3", "fsdp=3 x sequence=1 x tensor=1 x expert=1"),
        (f"{EVALUATE} --data /data/c --mesh fsdp=3", "needs 3 devices, and there are 64; change"),
        (f"{EVALUATE} --data /data/c --mesh fdsp=3", "Did you mean 'fsdp'?"),
        (f"{EVALUATE} --data /data/c --mesh fsdp=-1,tensor=7", "config.mesh or --mesh so that"),
        (f"{SAMPLE} --mesh fsdp=3", "needs 3 devices, and there are 64"),
        (f"{SAMPLE} --mesh fdsp=3", "Did you mean 'fsdp'?"),
        (f"{IMPORT} --mesh fsdp=3", "needs 3 devices, and there are 64"),
        (f"{IMPORT} --mesh fdsp=3", "Did you mean 'fsdp'?"),
        (f"{SAMPLE} --prompt-file local.txt", f"--prompt-file local.txt {NOT_SHARED}: mount"),
        (f"{SAMPLE} --prompt-file gs://b/p.txt", "--prompt-file gs://b/p.txt must be on a disk"),
        (f"{SAMPLE} --html out.html", f"--html out.html {NOT_SHARED}: write gs://"),
        (f"{SAMPLE} --html /data/out.html", "leave out the :ro of --gcs-fuse, or write to gs://"),
        (f"{EVALUATE} --tasks questions.jsonl", f"--tasks questions.jsonl {NOT_SHARED}"),
        (f"{EVALUATE} --tasks s3://b/q.jsonl", "--tasks s3://b/q.jsonl needs the extra 's3'"),
        (f"{EVALUATE} --data /data/c --tokenizer my/tok", f"--tokenizer my/tok {NOT_SHARED}"),
        (f"{EVALUATE} --data corpus", f"--data corpus {NOT_SHARED}"),
        (f"{PREPARE} --tokenizer bytes --input s3://b/raw", "--input s3://b/raw needs the extra"),
        (f"{PREPARE} --tokenizer bytes --input corpus", f"--input corpus {NOT_SHARED}"),
        (f"{PREPARE} --tokenizer bytes --input /data/a corpus", f"--input corpus {NOT_SHARED}"),
        (f"{PREPARE} --tokenizer my/tok --input /data/a", f"--tokenizer my/tok {NOT_SHARED}"),
        ("prepare --join corpus", f"--join corpus {NOT_SHARED}"),
        ("prepare --join gs://", "--join gs:// names no bucket; write gs://BUCKET/DIR"),
        (
            "prepare --sequence-length 64 --tokenizer bytes --input /data/a --output gs://b/c",
            "--output gs://b/c must be on a disk",
        ),
        (f"{EXPORT} gs://b/hf", "--output gs://b/hf must be on a disk"),
        (f"{EXPORT} /data/hf", "leave out the :ro of --gcs-fuse."),
        (
            f"{EXPORT} /runs/hf --chat-template chat.jinja",
            f"--chat-template chat.jinja {NOT_SHARED}",
        ),
        ("import --from ./llada --output gs://b/llada", f"--from ./llada {NOT_SHARED}: mount"),
        (f"{TRAIN} --workdir gs:///r --config.data.path=/data/c", "--workdir gs:///r names no"),
        (f"{TRAIN} --workdir gs://b/r --config.data.path=gs://", "data.path=gs:// names no bucket"),
    ],
)
def test_what_the_hosts_could_not_do_is_refused_in_one_sentence(line, message):
    with pytest.raises(UserError) as refused:
        check(["llada-jax", *line.split()], PLACE)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        f"{EVALUATE} --data /data/c --mesh fsdp=-1 --report gs://b/report",
        f"{EVALUATE} --data gs://b/c --mesh data=8,fsdp=8 --tokenizer bytes",
        f"{EVALUATE} --tasks gs://b/questions.jsonl --tokenizer gs://b/tok",
        f"{EVALUATE} --tasks https://example.com/questions.jsonl",
        f"{SAMPLE}@10 --mesh fsdp=16,tensor=4 --prompt-file /data/p.txt --html /runs/me@home.html",
        f"{IMPORT} --mesh fsdp=64",
        "import --from /data/llada --output /runs/llada --tokenizer /data/tok",
        f"{EXPORT} /runs/hf --tokenizer /data/tok",
        f"{PREPARE} --tokenizer spm:8000 --input gs://b/raw/*.txt /data/raw/*.txt",
        "prepare --join gs://b/corpus",
        "rollback --workdir gs://b/r --to 10",
    ],
)
def test_what_they_can_do_is_let_through(line):
    assert "can run there" in check(["llada-jax", *line.split()], PLACE)


def test_a_mesh_is_made_of_all_slices_and_of_devices_of_an_unknown_kind():
    two = Place(machines=PLACE.machines, num_slices=2, mounts=PLACE.mounts)
    line = f"llada-jax {EVALUATE} --data /data/c --mesh"
    check([*line.split(), "data=2,fsdp=64"], two)
    with pytest.raises(UserError, match="or data=2 in --mesh"):
        check([*line.split(), "fsdp=128"], two)
    # as on SLURM
    some = Place(has_own_disks=True, num_devices=16)
    check([*line.split(), "fsdp=16"], some)
    with pytest.raises(UserError, match="needs 8 devices, and there are 16"):
        check([*line.split(), "fsdp=8"], some)
    # on CPUs, whose number is not known
    check([*line.split(), "fsdp=8"], Place(has_own_disks=True))
    with pytest.raises(UserError, match="there is no axis 'fdsp'"):
        check([*line.split(), "fdsp=8"], Place(has_own_disks=True))
