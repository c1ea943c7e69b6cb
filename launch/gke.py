"""Runs one command as a JobSet on every host of TPU slices, or on GPU nodes, of a GKE cluster.

    python launch/gke.py --name llada-8b --topology v5p-128 --slices 2 \\
        --image REGION-docker.pkg.dev/P/R/llada_jax:1 --gcs-fuse my-bucket:/data:ro -- \\
        llada-jax train --config configs/llada_8b.py --workdir gs://my-bucket/llada-8b \\
        --config.data.path=/data/corpus --config.mesh.data=2
    python launch/gke.py --name llada-8b --follow       (the logs of all hosts)
    python launch/gke.py --name llada-8b --delete

When a host exits with 42, is killed or disappears, the JobSet restarts, up to --max-restarts times,
and the command continues from its last checkpoint; any other failure ends the JobSet. The command
is checked first, and its config file is sent along, so that a changed config needs no new image.
--dry-run prints the manifests instead of applying them. You need kubectl with credentials for the
cluster, JobSet installed on the cluster, and an image (launch/Dockerfile).
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import yaml
from cloud import (
    COORDINATOR_PORT,
    HOST_EXTRAS,
    RESTART_STATUSES,
    Capacity,
    check_command,
    check_label,
    check_name,
    command_of,
    make_parser,
    parse_buckets,
    parse_pair,
)
from gke_volumes import CONFIG_LABEL, Mounts, mounts_of, shipped
from preflight import Place

from llada_jax.cluster.compiler_flags import check_flags
from llada_jax.cluster.hardware import ACCELERATORS, Slice, check_slices, machines_named
from llada_jax.errors import UserError
from llada_jax.ranges import Range, check_number

CONTAINER, JOB = "trainer", "slice-job"
# How long a finished JobSet, and so its logs, can still be read.
SECONDS_KEPT = 12 * 3600
# libtpu talks over the first within a slice, and over the second between slices.
DEVICE_PORT, SLICE_PORT = 8471, 8080

# kind of capacity -> (node label, taint that such nodes may carry)
CAPACITY_LABELS = {
    "spot": ("cloud.google.com/gke-spot", "cloud.google.com/gke-spot"),
    "flex": ("cloud.google.com/gke-flex-start", "cloud.google.com/gke-queued"),
}


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The machines of a request.

    These are `num_groups` groups (slices) of `hosts_per_group` nodes with `chips` chips each.

    Attributes:
        resource: what a pod asks for, "google.com/tpu" or "nvidia.com/gpu".
        node_selector: the labels of such nodes.
    """

    resource: str
    num_groups: int
    hosts_per_group: int
    chips: int
    node_selector: dict[str, str]

    @property
    def is_tpu(self) -> bool:
        return self.resource == "google.com/tpu"


def tpu_hosts(tpu: Slice, num_slices: int) -> Hosts:
    """Returns the nodes of TPU slices, e.g. of "v5p-128"."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.accelerator.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": tpu.topology_name,
    }
    return Hosts(
        resource="google.com/tpu",
        num_groups=num_slices,
        hosts_per_group=tpu.num_hosts,
        chips=tpu.chips_per_host,
        node_selector=selector,
    )


def gpu_hosts(machines: Slice) -> Hosts:
    """Returns whole nodes with GPUs, e.g. of "64xh100"."""
    gpu = machines.accelerator
    if not gpu.gke_accelerator:
        offered = ", ".join(
            chip.name
            for chip in ACCELERATORS.values()
            if chip.gke_accelerator and chip.platform == "gpu"
        )
        raise UserError(f"GKE does not offer {gpu.name}; choose one of {offered}.")
    if machines.num_chips % gpu.chips_per_host:
        raise UserError(
            f"{machines.name} is a part of a node, and a pod gets a whole one here; write "
            f"{gpu.chips_per_host}x{gpu.name}."
        )
    return Hosts(
        resource="nvidia.com/gpu",
        num_groups=1,
        hosts_per_group=machines.num_hosts,
        chips=gpu.chips_per_host,
        node_selector={"cloud.google.com/gke-accelerator": gpu.gke_accelerator},
    )


def capacity_selector(capacity: Capacity) -> dict[str, str]:
    """Returns the node label that selects a kind of capacity."""
    if capacity.kind == "reservation":
        if not capacity.detail:
            raise UserError(
                "On GKE, --capacity reservation needs a name; write --capacity reservation:NAME."
            )
        return {"cloud.google.com/reservation-name": capacity.detail}
    return {CAPACITY_LABELS[capacity.kind][0]: "true"} if capacity.kind in CAPACITY_LABELS else {}


def tolerations(hosts: Hosts, capacity: Capacity) -> list[dict]:
    """Returns what admits a pod to nodes reserved for accelerators and for one kind of capacity."""
    keys = [hosts.resource] + [
        taint for kind, (_, taint) in CAPACITY_LABELS.items() if kind == capacity.kind
    ]
    return [{"key": key, "operator": "Exists"} for key in keys]


def literal(text: str) -> str:
    """Returns a word of a command, or the value of a variable, as Kubernetes gives it back
    unchanged: it replaces $(NAME) by a variable and $$ by a dollar.
    """
    return text.replace("$", "$$")


def environment(name: str, hosts: Hosts, extra: dict[str, str]) -> list[dict]:
    """Returns the container's variables: how the processes find each other, then the user's own.

    A TPU process learns its number and its peers from what GKE injects, a GPU process from these.
    """
    given = {"PYTHONUNBUFFERED": "1"}
    if hosts.is_tpu:
        given |= {"JAX_PLATFORMS": "tpu,cpu", "JAX_COORDINATOR_PORT": str(COORDINATOR_PORT)}
    else:
        # The driver's libraries, which GKE mounts here and an image without CUDA does not look for.
        # With the platform named, a pod that does not find its GPUs ends (sharding.check_gpus), and
        # does not train on its CPUs.
        given |= {"JAX_PLATFORMS": "cuda,cpu", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
        # What the check of the command and `plan` call usable; JAX itself would stop at 75%.
        given |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    if not hosts.is_tpu and hosts.hosts_per_group > 1:
        given |= {
            "JAX_COORDINATOR_ADDRESS": f"{name}-{JOB}-0-0.{name}:{COORDINATOR_PORT}",
            "JAX_NUM_PROCESSES": str(hosts.hosts_per_group),
            # All of them. When this is set, JAX does not look for a Kubernetes library to find out.
            "JAX_LOCAL_DEVICE_IDS": ",".join(str(chip) for chip in range(hosts.chips)),
        }
    variables: list[dict[str, Any]] = [
        {"name": key, "value": literal(value)} for key, value in (given | extra).items()
    ]
    if not hosts.is_tpu and hosts.hosts_per_group > 1:
        rank = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        variables.append({"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": rank}}})
    return variables


def pod_template(
    *,
    name: str,
    hosts: Hosts,
    image: str,
    command: list[str],
    capacity: Capacity,
    env: dict[str, str],
    mounts: Mounts,
    node_selector: dict[str, str],
    priority: str,
    service_account: str,
    grace_seconds: int,
) -> dict:
    """Returns the template of the pod that runs on every host."""
    ports = [COORDINATOR_PORT] + ([DEVICE_PORT, SLICE_PORT] if hosts.is_tpu else [])
    container = {
        "name": CONTAINER,
        "image": image,
        # There is no shell in between, so that the trainer itself receives SIGTERM and its exit
        # status is the pod's.
        "command": [literal(word) for word in command],
        "env": environment(name, hosts, env),
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"limits": {hosts.resource: hosts.chips}},
        # libtpu locks memory and opens the devices.
        "securityContext": {"privileged": True},
        "volumeMounts": mounts.mounts,
    }
    spec = {
        "restartPolicy": "Never",
        "nodeSelector": hosts.node_selector | capacity_selector(capacity) | node_selector,
        "tolerations": tolerations(hosts, capacity),
        # Slices talk over the data centre's network: through the node's own interface, not the
        # overlay network of the cluster.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": grace_seconds,
        "containers": [container],
        "volumes": mounts.volumes,
    }
    spec |= {"priorityClassName": priority} if priority else {}
    spec |= {"serviceAccountName": service_account} if service_account else {}
    return ({"metadata": {"annotations": mounts.annotations}} if mounts.annotations else {}) | {
        "spec": spec
    }


def jobset(*, name: str, hosts: Hosts, template: dict, max_restarts: int, queue: str) -> dict:
    """Returns the JobSet: one Job per slice, one pod per host, and what happens when a pod fails.

    When a pod's exit status is not worth a restart, the pod failure policy fails its Job, and the
    JobSet's rule FailJobSet then ends everything. Every other failure restarts all slices together.
    """
    check_name(
        name, longest=f"{name}-{JOB}-{hosts.num_groups - 1}-{hosts.hosts_per_group - 1}-abcde"
    )
    metadata: dict[str, Any] = {"name": name}
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    # A slice of several hosts is a node pool, and all pods of one slice must run in the same pool.
    if hosts.is_tpu and hosts.hosts_per_group > 1:
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    fails = {"containerName": CONTAINER, "operator": "NotIn", "values": list(RESTART_STATUSES)}
    job = {
        "parallelism": hosts.hosts_per_group,
        "completions": hosts.hosts_per_group,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": fails}]},
        "template": template,
    }
    rule = {
        "name": "notWorthARestart",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "ttlSecondsAfterFinished": SECONDS_KEPT,
            "failurePolicy": {"maxRestarts": max_restarts, "rules": [rule]},
            "replicatedJobs": [
                {"name": JOB, "replicas": hosts.num_groups, "template": {"spec": job}}
            ],
        },
    }


def machines_of(args: argparse.Namespace) -> Slice:
    """Returns one slice, or all GPUs, of a command line: v5p-128, 64xh100, or h100 with --hosts."""
    if args.hosts is not None:
        check_number("--hosts ", args.hosts, Range(1))
    is_chip = args.topology in ACCELERATORS
    if is_chip and ACCELERATORS[args.topology].platform == "gpu":
        chip = ACCELERATORS[args.topology]
        if args.slices > 1:
            raise UserError(
                f"{args.topology} comes in hosts, not in slices; write --hosts {args.slices}."
            )
        return machines_named(f"{(args.hosts or 1) * chip.chips_per_host}x{chip.name}")
    machines = machines_named(args.topology)
    if args.hosts:
        raise UserError(
            f"--hosts is for the name of a GPU: the number of hosts of {args.topology} follows "
            "from its name; leave it out."
        )
    check_slices(machines, args.slices)
    return machines


def place_of(args: argparse.Namespace, machines: Slice) -> Place:
    """Returns what the pods of a command line are, for the check of the command."""
    buckets = {bucket.path: not bucket.is_read_only for bucket in parse_buckets(args.gcs_fuse)}
    of_machines = "cuda" if machines.accelerator.platform == "gpu" else "tpu"
    return Place(
        machines=machines,
        num_slices=args.slices,
        # and not the RAM disk, of which every node has one of its own
        mounts=buckets,
        extras=HOST_EXTRAS,
        how_to_install=f"build an image with --build-arg EXTRA={of_machines},{{extra}} and add "
        "--unchecked",
    )


def check_image(image: str) -> None:
    """Raises UserError unless the name of an image means the same image at every start."""
    if not image:
        raise UserError(
            "--image is missing; build one with launch/Dockerfile and pass its full name."
        )
    _, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" not in image and tag in ("", "latest"):
        raise UserError(
            f"--image {image} means what was pushed last, so that a host that restarts could run "
            "another version than the others; give it a tag of its own, such as llada_jax:1."
        )


def manifests_of(args: argparse.Namespace) -> list[dict]:
    """Returns what a command line creates: the JobSet, and before it the ConfigMap of its config.

    Raises:
        UserError: the request is impossible, or the command cannot run on such machines.
    """
    command = command_of(args)
    check_image(args.image)
    machines = machines_of(args)
    check_flags(args.flags, machines.accelerator.platform)
    if machines.accelerator.platform == "gpu":
        hosts = gpu_hosts(machines)
    else:
        hosts = tpu_hosts(machines, args.slices)
    config_map, command_there = shipped(args.name, command)
    template = pod_template(
        name=args.name,
        hosts=hosts,
        image=args.image,
        command=command_there,
        capacity=args.capacity,
        env=args.flags | dict(args.env),
        mounts=mounts_of(
            parse_buckets(args.gcs_fuse),
            args.ramdisk,
            config_map["metadata"]["name"] if config_map else "",
        ),
        node_selector=dict(args.node_selector),
        priority=args.priority,
        service_account=args.service_account,
        grace_seconds=args.grace,
    )
    manifest = jobset(
        name=args.name,
        hosts=hosts,
        template=template,
        max_restarts=args.max_restarts,
        queue=args.queue,
    )
    check_command(args, command, place_of(args, machines), launcher="gke")
    return [*([config_map] if config_map else []), manifest]


def to_yaml(manifests: list[dict]) -> str:
    """Returns manifests as YAML, with the innermost lists and mappings on one line."""
    return yaml.safe_dump_all(manifests, sort_keys=False, default_flow_style=None, width=120)


def kubectl(args: argparse.Namespace) -> list[list[str]]:
    """Returns the kubectl commands of a command line; `apply` reads manifests from its stdin."""
    program = ["kubectl", *(["--namespace", args.namespace] if args.namespace else [])]
    if args.delete:
        return [
            [*program, "delete", "jobset", args.name],
            [*program, "delete", "configmap", "--selector", f"{CONFIG_LABEL}={args.name}"],
        ]
    if args.follow:
        pods = f"jobset.sigs.k8s.io/jobset-name={args.name}"
        # kubectl's own limits are 5 pods and 10 lines.
        all_hosts = ["--max-log-requests", "10000", "--tail", "-1"]
        shown = ["--follow", "--prefix", "--container", CONTAINER, *all_hosts]
        return [[*program, "logs", *shown, "--selector", pods]]
    return [[*program, "apply", "-f", "-"]]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--hosts",
        type=int,
        metavar="N",
        help="number of GPU nodes, when --topology is the name of a GPU such as h100",
    )
    parser.add_argument(
        "--image", metavar="IMAGE", help="container image that has llada_jax (launch/Dockerfile)"
    )
    parser.add_argument("--queue", default="", metavar="NAME", help="LocalQueue of Kueue")
    parser.add_argument(
        "--priority", default="", metavar="CLASS", help="PriorityClass of the cluster"
    )
    parser.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="Kubernetes service account of the pods",
    )
    parser.add_argument(
        "--namespace", default="", metavar="NAME", help="namespace (default: kubectl's current one)"
    )
    parser.add_argument(
        "--node-selector",
        type=parse_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="label that the nodes must have; may be repeated",
    )
    parser.add_argument(
        "--ramdisk",
        default="",
        metavar="/PATH",
        help="where to mount node-local memory for frequent checkpoints",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--follow", action="store_true", help="show the logs of all hosts")
    action.add_argument("--delete", action="store_true", help="delete the JobSet, running or not")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        # Before kubectl sees them: --name=--all --delete would delete every JobSet.
        check_name(args.name, longest=args.name)
        if args.namespace:
            check_label(args.namespace, "--namespace")
        manifest = None if args.follow or args.delete else to_yaml(manifests_of(args))
    except UserError as error:
        print(f"gke: {error}", file=sys.stderr)
        return error.exit_status
    commands = kubectl(args)
    if args.dry_run:
        print(manifest or "\n".join(map(" ".join, commands)), end="" if manifest else "\n")
        return 0
    try:
        done = [
            subprocess.run(command, input=manifest, text=True, check=False) for command in commands
        ]
        return max(process.returncode for process in done)
    except FileNotFoundError:
        print(
            "gke: kubectl is not installed here; install it, or pipe the output of --dry-run to a "
            "machine that has it.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        # This is how --follow ends.
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
