"""What the pods of launch/gke.py see in addition to their image: buckets, memory, and their config.

The config travels as a ConfigMap, so that a changed config needs no new image.

This is not a launcher, and nothing here talks to a cluster; launch/gke.py imports it.
"""

import ast
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud import Bucket, check_mount_points, mount_point
from preflight import config_of, with_config

from llada_jax.errors import UserError

# Where the pods find the files. Not below the code of the image, which stays as it was built.
DIRECTORY = "/etc/llada_jax"
# Kubernetes refuses a ConfigMap of more than 1 MiB, names and metadata included.
MOST_BYTES = 1_000_000
# All ConfigMaps of a run have it, with the run's name as its value.
CONFIG_LABEL = "llada-jax"


@dataclass(frozen=True, kw_only=True)
class Mounts:
    """What a pod sees in addition to its image: volumes, their mount points, and annotations."""

    volumes: list[dict] = field(default_factory=list)
    mounts: list[dict] = field(default_factory=list)
    annotations: dict[str, str] = field(default_factory=dict)


def mounts_of(buckets: list[Bucket], ramdisk: str, config_map: str = "") -> Mounts:
    """Returns shared memory, buckets, the RAM disk and the config as volumes and mounts.

    Args:
        ramdisk: where the node's RAM disk is mounted; "" for none.
        config_map: name of the ConfigMap with the config of the run; "" for none.
    """
    # Without its own volume, /dev/shm holds 64 MB: too little for NCCL and for workers that share
    # arrays.
    volumes: list[dict[str, Any]] = [{"name": "dshm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [{"name": "dshm", "mountPath": "/dev/shm"}]
    for number, bucket in enumerate(buckets):
        # The pods use the host's network, where the driver looks for the service account only if
        # asked to.
        attributes = {
            "bucketName": bucket.name,
            "mountOptions": "implicit-dirs",
            "hostNetworkPodKSA": "true",
        }
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        read_only = {"readOnly": True} if bucket.is_read_only else {}
        volumes.append({"name": f"bucket-{number}", "csi": csi | read_only})
        mounts.append({"name": f"bucket-{number}", "mountPath": bucket.path} | read_only)
    if ramdisk:
        volumes.append(
            {"name": "ramdisk", "csi": {"driver": "multitier-checkpoint.csi.storage.gke.io"}}
        )
        mounts.append({"name": "ramdisk", "mountPath": mount_point("--ramdisk ", ramdisk)})
    if config_map:
        volumes.append({"name": "config", "configMap": {"name": config_map}})
        mounts.append({"name": "config", "mountPath": DIRECTORY, "readOnly": True})
    check_mount_points([mount["mountPath"] for mount in mounts])
    # 0 means "no limit".
    annotations = {
        f"gke-gcsfuse/{limit}-limit": "0" for limit in ("cpu", "memory", "ephemeral-storage")
    }
    return Mounts(
        volumes=volumes,
        mounts=mounts,
        annotations={"gke-gcsfuse/volumes": "true", **annotations} if buckets else {},
    )


# ---- the config


def files_of(config: Path) -> dict[str, str]:
    """Returns {name: text} of a config file and of the files next to it that it needs.

    These are the modules that it imports and those that it names as module:attribute, and in turn
    what they import.

    Raises:
        UserError: one of them is a package, or all together are too large.
    """
    files = {}
    for path in needed_by(config):
        if path.name == "__init__.py":
            raise UserError(
                f"{config} needs the package {path.parent.name} next to it, and a ConfigMap holds "
                "single files; put it into the image, or into one file."
            )
        files[path.name] = path.read_text()
    if (size := sum(len(text.encode()) for text in files.values())) > MOST_BYTES:
        raise UserError(
            f"{config} and what it imports have {size:,} bytes, and a ConfigMap holds "
            f"{MOST_BYTES:,}; put large tables into the image or into the bucket."
        )
    return files


def needed_by(config: Path) -> list[Path]:
    """Returns a config file and the modules next to it that it needs, and in turn what they need.

    A package is named by its __init__.py, and is not read.

    Raises:
        UserError: one of the files is not Python.
    """
    found, waiting = [], [config]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        if path.name == "__init__.py":
            continue
        try:
            modules = modules_in(path.read_text())
        except SyntaxError as error:
            raise UserError(f"{path} is not Python ({error}); fix it.") from error
        for module in sorted(modules):
            places = (config.parent / module / "__init__.py", config.parent / f"{module}.py")
            waiting += [place for place in places if place.is_file()][:1]
    return found


def modules_in(text: str) -> set[str]:
    """Returns the first names of what a Python file imports or names as "module:attribute"."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            found.add(node.value.partition(":")[0])
    return {first for name in found if (first := name.split(".")[0]).isidentifier()}


def with_own_parts(files: dict[str, str], config: Path, command: list[str]) -> dict[str, str]:
    """Returns the files together with the own parts that knobs of the command line name.

    Raises:
        UserError: a part lies in the current directory, which the pods do not have.
    """
    words = [word.rpartition("=")[2].partition(":")[0] for word in command if ":" in word]
    named = {word for word in words if word.isidentifier()}
    for module in sorted(named):
        if (config.parent / f"{module}.py").is_file():
            files |= files_of(config.parent / f"{module}.py")
    for module in sorted(named.union(*map(modules_in, files.values())) - sys.stdlib_module_names):
        if f"{module}.py" not in files and Path(f"{module}.py").is_file():
            raise UserError(
                f"{module}.py lies in the current directory, and the pods get only what lies next "
                f"to {config}; put it there, or into the image under another name."
            )
    return files


def shipped(name: str, command: list[str]) -> tuple[dict | None, list[str]]:
    """Returns the ConfigMap with the config of a command, and the command that reads it there.

    Returns None and the command as it is where it names no config that exists on this machine.

    The name ends with a hash of the content: a start with a changed config never meets the files of
    an earlier one, and the pods of a run that restarts never see another config than before.
    """
    config = Path(config_of(command))
    if not config.is_file():
        return None, command
    files = with_own_parts(files_of(config), config, command)
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:8]
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-{digest}", "labels": {CONFIG_LABEL: name}},
        "immutable": True,
        "data": dict(sorted(files.items())),
    }
    return manifest, with_config(command, f"{DIRECTORY}/{config.name}")
