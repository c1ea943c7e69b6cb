"""What the manifests of launch/gke.py ask for."""

import pytest
from support.gke_manifests import REQUESTS, container_of, job_of, pod_of, render

from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.cluster.hardware import SLICES, slice_named


@pytest.mark.parametrize("name", SLICES)
def test_every_slice_asks_for_its_hosts_chips_and_topology(name):
    manifest, tpu = render("--topology", name, "--slices", "3"), slice_named(name)
    job, pod = job_of(manifest)["spec"], pod_of(manifest)["spec"]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job["parallelism"] == job["completions"] == tpu.num_hosts
    chips = container_of(manifest)["resources"]["limits"]["google.com/tpu"]
    assert chips * tpu.num_hosts == tpu.num_chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == tpu.topology_name
    # Several slices that have one host each may share a node pool.
    annotations = manifest["metadata"].get("annotations", {})
    assert ("alpha.jobset.sigs.k8s.io/exclusive-topology" in annotations) == (tpu.num_hosts > 1)
    assert "annotations" not in pod_of(manifest).get("metadata", {})


def test_gpu_hosts_get_their_place_in_the_run_from_the_environment():
    manifest = render("--topology", "h100", "--hosts", "4")
    env = {entry["name"]: entry for entry in container_of(manifest)["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "run-slice-job-0-0.run:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    assert env["JAX_LOCAL_DEVICE_IDS"]["value"] == "0,1,2,3,4,5,6,7"
    rank = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container_of(manifest)["resources"]["limits"] == {"nvidia.com/gpu": 8}
    alone = {entry["name"] for entry in container_of(render("--topology", "h100"))["env"]}
    assert not alone & {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}


def test_only_status_42_and_statuses_of_signals_restart_the_run():
    (rule,) = job_of(render("--topology", "v5p-8"))["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == [42, *range(127, 256)]


def test_a_pod_that_fails_is_not_repeated_by_anything_but_the_jobset():
    manifest = render("--topology", "v5p-8", "--max-restarts", "7", "--grace", "90")
    job, pod = job_of(manifest)["spec"], pod_of(manifest)["spec"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["terminationGracePeriodSeconds"] == 90
    # half a day, in which its logs can be read
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 43_200


@pytest.mark.parametrize(("topology", "ports"), [("v5p-16", [8476, 8471, 8080]), ("h100", [8476])])
def test_pods_talk_over_the_network_of_their_node(topology, ports):
    manifest = render("--topology", topology)
    pod, container = pod_of(manifest)["spec"], container_of(manifest)
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert [port["containerPort"] for port in container["ports"]] == ports
    # libtpu locks memory
    assert container["securityContext"] == {"privileged": True}


def test_what_a_cluster_asks_for_is_where_it_looks_for_it():
    flags = ["--queue", "q", "--priority", "p", "--service-account", "s"]
    flags += ["--node-selector", "disk=fast", "--capacity", "reservation:mine"]
    manifest = render("--topology", "v5p-8", *flags)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    pod = pod_of(manifest)["spec"]
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("p", "s")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x1",
        "cloud.google.com/reservation-name": "mine",
        "disk": "fast",
    }
    plain = render("--topology", "h100")
    assert "labels" not in plain["metadata"]
    assert not {"priorityClassName", "serviceAccountName"} & set(pod_of(plain)["spec"])
    assert pod_of(plain)["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-mega-80gb"
    }


@pytest.mark.parametrize(
    ("topology", "known"),
    [
        ("v5p-16", {"JAX_PLATFORMS": "tpu,cpu", "JAX_COORDINATOR_PORT": "8476"}),
        (
            "h100",
            {
                "JAX_PLATFORMS": "cuda,cpu",
                # where GKE mounts the driver
                "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
                "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
            },
        ),
    ],
)
def test_a_host_that_does_not_find_its_chips_ends(topology, known):
    environment = container_of(render("--topology", topology))["env"]
    assert {entry["name"]: entry["value"] for entry in environment} == {
        "PYTHONUNBUFFERED": "1",
        **known,
    }


def test_a_preset_of_flags_reaches_the_pods_unless_a_variable_replaces_it():
    ((name, value),) = flags_named("v6e").items()
    for words, expected in (([], value), (["--env", f"{name}=own"], "own")):
        container = container_of(render("--topology", "v6e-8", "--flags", "v6e", *words))
        assert {entry["name"]: entry["value"] for entry in container["env"]}[name] == expected


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a command or a value: third_party/forked/golang/expansion/expand.go
    of kubernetes/kubernetes, written down in Python.
    """
    out, i = "", 0
    while i < len(text):
        following = text[i + 1 : i + 2]
        if text[i] != "$" or not following:
            out, i = out + text[i], i + 1
        elif following == "$":
            out, i = out + "$", i + 2
        elif following == "(" and ")" in text[i:]:
            end = text.index(")", i)
            name = text[i + 2 : end]
            out, i = out + variables.get(name, f"$({name})"), end + 1
        elif following == "(":
            out, i = out + "$(", i + 2
        else:
            out, i = out + "$" + following, i + 2
    return out


AWKWARD = [
    "a b",
    "it's",
    '"',
    "$(HOME)",
    "$$(HOME)",
    "$$",
    "$",
    "$PATH",
    "x\ny",
    "\\",
    "#",
    "",
    "é",
]


def test_words_and_variables_reach_the_command_as_they_are():
    """There is no shell in between, and Kubernetes replaces nothing in them."""
    words = [f"--env=V{number}={value}" for number, value in enumerate(AWKWARD)]
    container = container_of(render("--topology", "v5p-8", *words, command=["train", *AWKWARD]))
    assert [expanded(word, {"HOME": "/root"}) for word in container["command"][1:]] == AWKWARD
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    found = [expanded(values[f"V{number}"], {"HOME": "/root"}) for number in range(len(AWKWARD))]
    assert found == AWKWARD


def test_variables_of_the_user_replace_those_of_the_launcher():
    env = container_of(
        render("--topology", "v5p-8", "--env", "JAX_PLATFORMS=tpu", "--env", "X=a=b")
    )["env"]
    values = {entry["name"]: entry["value"] for entry in env}
    assert len(values) == len(env)
    assert values["JAX_PLATFORMS"] == "tpu"
    assert values["X"] == "a=b"


def test_volumes_are_mounted_where_asked():
    manifest = render(*REQUESTS["buckets"], "--ramdisk", "/local")
    mounts = {mount["mountPath"]: mount for mount in container_of(manifest)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(manifest)["spec"]["volumes"]}
    sources = {path: volumes[mount["name"]] for path, mount in mounts.items()}
    assert set(mounts) == {"/dev/shm", "/data", "/runs", "/local"}
    assert sources["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert sources["/data"]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert (sources["/data"]["csi"].get("readOnly"), mounts["/data"].get("readOnly")) == (
        True,
        True,
    )
    assert (sources["/runs"]["csi"].get("readOnly"), mounts["/runs"].get("readOnly")) == (
        None,
        None,
    )
    assert pod_of(manifest)["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert sources["/local"]["csi"]["driver"] == "multitier-checkpoint.csi.storage.gke.io"


@pytest.mark.parametrize(
    ("capacity", "label", "taint"),
    [
        ("on-demand", None, None),
        ("spot", "cloud.google.com/gke-spot", "cloud.google.com/gke-spot"),
        ("flex", "cloud.google.com/gke-flex-start", "cloud.google.com/gke-queued"),
        ("reservation:mine", "cloud.google.com/reservation-name", None),
    ],
)
def test_capacity_selects_the_nodes(capacity, label, taint):
    pod = pod_of(render("--topology", "v5p-8", "--capacity", capacity))["spec"]
    selected = set(pod["nodeSelector"]) - {
        "cloud.google.com/gke-tpu-accelerator",
        "cloud.google.com/gke-tpu-topology",
    }
    assert selected == ({label} if label else set())
    assert {t["key"] for t in pod["tolerations"]} == {"google.com/tpu", *([taint] if taint else [])}
