"""Joining the other processes, and what a process does when they are gone, stuck or never join."""

import http.server
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import types

import jax
import pytest
from jax._src.distributed import global_state
from support.processes import run_python
from support.runs import free_port

from llada_jax.cluster import distributed
from llada_jax.errors import LostPeer, UserError

TEAM = {"JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_the_launchers_variables_are_the_arguments():
    assert distributed.explicit_arguments(TEAM) == {
        "coordinator_address": "host0:1234",
        "num_processes": 4,
        "process_id": 3,
    }
    assert distributed.explicit_arguments({}) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not; set all three or none"),
        ({"JAX_PROCESS_ID": "4"}, "must lie between 0 and JAX_NUM_PROCESSES - 1 = 3"),
        ({"JAX_NUM_PROCESSES": "four"}, "must be integers"),
        ({"JAX_COORDINATOR_ADDRESS": "host0"}, "has no port"),
        ({"JAX_COORDINATOR_ADDRESS": ":1234"}, "has no host"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:"}, "the port '' must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:port"}, "the port 'port' must be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:0"}, "between 1 and 65535"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:65536"}, "between 1 and 65535"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change, says):
    with pytest.raises(UserError, match=re.escape(says)):
        distributed.explicit_arguments({**TEAM, **change})


@pytest.mark.parametrize(
    ("environment", "is_cluster"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # inside sbatch, but not started by srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_a_cluster_is_recognised_by_its_environment(environment, is_cluster):
    assert distributed.is_cluster(environment) == is_cluster


@pytest.mark.parametrize("value", ["", "two", "-1", "0", "1.5"])
def test_a_number_of_the_scheduler_that_is_none_is_refused_by_name(value):
    with pytest.raises(UserError, match="SLURM_NTASKS="):
        distributed.is_cluster({"SLURM_NTASKS": value, "SLURM_STEP_NODELIST": "a,b"})
    slices = {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": value}
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES="):
        distributed.num_slice_hosts(slices)


WRONG_SLICES = "NUM_SLICES=two SLICE_ID= SLICE_ID=x SLICE_ID=2 PORT=http PORT=0 PORT=65536"


@pytest.mark.parametrize("change", [*WRONG_SLICES.split(), "COORDINATOR_ADDRESS="])
def test_a_variable_of_several_slices_that_cannot_be_is_refused_by_name(change, monkeypatch):
    name, value = f"MEGASCALE_{change}".split("=")
    slices = {"NUM_SLICES": "2", "SLICE_ID": "1", "PORT": "8080", "COORDINATOR_ADDRESS": "a"}
    right = {"TPU_WORKER_HOSTNAMES": "a,b", **{f"MEGASCALE_{k}": v for k, v in slices.items()}}
    distributed.check_slices(right)
    distributed.check_slices({name: value})  # not in a slice
    monkeypatch.setattr(os, "environ", {**right, name: value})
    with pytest.raises(UserError, match=name):
        distributed.initialize()


@pytest.mark.parametrize("ids", ["", "a", "0,", "0;1"])
def test_numbers_of_devices_that_are_none_are_refused(ids):
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS"):
        distributed.check_device_ids({"JAX_LOCAL_DEVICE_IDS": ids})
    distributed.check_device_ids({"JAX_LOCAL_DEVICE_IDS": "0,11"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "two", "SLURM_STEP_NODELIST": "a,b"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "", "SLURM_JOB_ID": "x", "SLURM_PROCID": ""},
        {"JAX_NUM_CPU_DEVICES": "two"},
        {"JAX_NUM_CPU_DEVICES": "0"},
        {"JAX_ENABLE_X64": "maybe"},
        {"JAX_PLATFORMS": "rocket"},
        {"JAX_PLATFORMS": "cuda,tpu"},
    ],
    ids=lambda environment: " ".join(f"{n}={v}" for n, v in environment.items()),
)
def test_a_wrong_variable_ends_in_one_sentence_and_status_2(environment):
    # a verb that asks for devices first, as training does
    code = """
        import sys, types
        import llada_jax.__main__ as program
        def verb(argv):
            from llada_jax.cluster import distributed
            import jax
            distributed.initialize()
            jax.devices()
        program.VERBS["devices"] = ("devices", "")
        sys.modules["llada_jax.verbs.devices"] = types.SimpleNamespace(main=verb)
        sys.exit(program.main(["devices"]))
    """
    done = run_python(code, {"JAX_PLATFORMS": "cpu", **environment}, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("llada-jax: ")
    assert any(name in done.stderr for name in environment) or "SLURM_*" in done.stderr


def test_the_coordinator_of_a_run_on_one_machine_listens_there_only():
    def bind(address):
        return distributed.bind_to_loopback({"coordinator_address": address})

    assert bind("localhost:7") == bind("127.0.0.1:7")
    assert bind("127.0.0.1:7") == {"coordinator_bind_address": "127.0.0.1:7"}
    # between hosts it has to be reachable from the others
    assert bind("node7:7") == bind("10.0.0.7:7") == bind("localhost.example.org:7") == {}


@pytest.mark.slow
def test_no_other_address_of_this_machine_reaches_the_coordinator_of_a_local_run():
    code = """
        import os, socket
        from llada_jax.cluster import distributed
        distributed.initialize()
        port = int(os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
        if os.environ["JAX_PROCESS_ID"] == "0":
            listening = [
                line.split()[1]
                for table in ("tcp", "tcp6")
                for line in open(f"/proc/net/{table}")
                if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
            ]
            print("listens", *listening)
    """
    team = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    environments = [{**os.environ, **team, "JAX_PROCESS_ID": str(i)} for i in (0, 1)]
    processes = [
        subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for env in environments
    ]
    out = [process.communicate(timeout=300)[0] for process in processes][0]
    assert [process.returncode for process in processes] == [0, 0]
    addresses = out.split("listens", 1)[1].split()
    assert addresses
    for address in addresses:
        host = address.rpartition(":")[0]
        # 127.0.0.1 as this machine's memory holds it, alone or within an IPv6 address
        assert host.endswith("0100007F"), addresses


def test_processes_that_meet_wait_as_long_as_they_are_told_or_a_day(monkeypatch):
    waited = []
    client = types.SimpleNamespace(wait_at_barrier=lambda *words: waited.append(words))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(global_state, "client", client)
    distributed.meet("compiled", timeout_s=60)
    distributed.meet("saved", timeout_s=0)
    assert waited == [("compiled", 60_000), ("saved", 86_400_000)]


def test_fewer_processes_than_the_slice_has_hosts_are_refused_before_anything_waits():
    slices = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "MEGASCALE_NUM_SLICES": "2"}
    arguments = distributed.explicit_arguments(
        {**TEAM, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    )
    with pytest.raises(UserError, match="have 8 hosts"):
        distributed.check_hosts(slices, arguments)
    distributed.check_hosts({}, arguments)


def test_traffic_between_processes_avoids_a_proxy():
    environment = {"https_proxy": "http://proxy:3128", "no_proxy": "localhost"}
    distributed.leave_no_proxy(environment, distributed.explicit_arguments(TEAM))
    assert environment["no_proxy"] == "localhost,host0"
    assert environment["no_grpc_proxy"] == "host0"
    untouched = {}
    distributed.leave_no_proxy(untouched, distributed.explicit_arguments(TEAM))
    assert untouched == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_start_that_waits_in_vain_says_who_is_missing_and_may_be_retried(number):
    port = free_port()
    team = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }
    done = run_python(
        "from llada_jax.cluster import distributed; distributed.WAITING_S = 1; "
        "distributed.initialize(initialization_timeout_s=3)",
        team,
        timeout=300,
    )
    assert done.returncode == 42, done.stderr
    assert f"joining     localhost:{port} as process {number} of 2, for at most 3 s" in done.stderr
    said = [line for line in done.stderr.splitlines() if "llada-jax: " in line]
    assert len(said) == 1
    assert said[0].startswith(f"llada-jax: Not all processes met within 3 s at localhost:{port}")
    who = "1 of 2 have joined" if number == 0 else "nothing answers there:"
    assert f"({who}" in said[0]
    assert re.search(rf"waiting +\d+ s: {re.escape(who)}", done.stderr)


@pytest.mark.parametrize("host", ["localhost", ""])
def test_a_port_that_another_program_holds_is_named_and_the_start_may_be_retried(host):
    """As an earlier start does that has not ended yet."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, 0))
        listener.listen()
        address = f"{host or socket.gethostname()}:{listener.getsockname()[1]}"
        team = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        place = distributed.explicit_arguments({**team, "JAX_PROCESS_ID": "0"})
        with pytest.raises(LostPeer, match=f"cannot listen at {address} .Address already in use."):
            distributed.check_port({}, place)
        # the other processes do not listen there
        distributed.check_port({}, {**place, "process_id": 1})
        code = "from llada_jax.cluster import distributed; distributed.initialize()"
        done = run_python(code, {**team, "JAX_PROCESS_ID": "0"})
        assert done.stderr.splitlines()[-1].startswith("llada_jax.errors.LostPeer: The first proc")
    distributed.check_port({}, place)


class MetadataServer(http.server.BaseHTTPRequestHandler):
    """What a Cloud TPU VM of a slice of four hosts answers about itself."""

    SAYS = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "w0:0:127.0.0.1,w1:1:10.0.0.2,w2:2:10.0.0.3,w3:3:10.0.0.4",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\n",
    }

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.SAYS[self.path.rpartition("/")[2]].encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def on_a_tpu_vm():
    """Returns (environment, code) that make a process believe that it is a host of that slice."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MetadataServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        {
            "GCE_METADATA_IP": f"127.0.0.1:{server.server_port}",
            "JAX_COORDINATOR_PORT": "8476",
            "JAX_PLATFORMS": "",
        },
        """
        import os
        from jax._src.clusters import cloud_tpu_cluster
        cloud_tpu_cluster.running_in_cloud_tpu_vm = True  # real VMs have chips and libtpu
        os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # set by the import, except on real VMs
        from llada_jax.cluster import distributed
        """,
    )
    server.shutdown()


def test_a_start_on_one_host_of_a_tpu_vm_slice_is_refused_before_anything_waits(on_a_tpu_vm):
    environment, code = on_a_tpu_vm
    alone = {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476",
        "JAX_NUM_PROCESSES": "1",
        "JAX_PROCESS_ID": "0",
    }
    done = run_python(code + "distributed.initialize()", {**environment, **alone})
    assert (
        "JAX_NUM_PROCESSES=1, but the TPU slices that this host belongs to have 4 hosts"
        in done.stderr
    )


@pytest.mark.slow
def test_a_host_of_a_tpu_vm_slice_finds_its_place(on_a_tpu_vm):
    environment, code = on_a_tpu_vm
    done = run_python(
        code + "print(distributed.place_in_cluster(5), distributed.num_slice_hosts({}))",
        environment,
    )
    place = {"coordinator_address": "127.0.0.1:8476", "num_processes": 4, "process_id": 2}
    assert done.stdout.strip() == f"{place} 4", done.stderr


@pytest.mark.slow
def test_while_the_name_of_the_first_host_does_not_resolve_it_says_so(on_a_tpu_vm, monkeypatch):
    environment, code = on_a_tpu_vm
    monkeypatch.setitem(
        MetadataServer.SAYS, "worker-network-endpoints", "w0:0:nowhere.invalid,w1:1:b,w2:2:c,w3:3:d"
    )
    done = run_python(
        code + "distributed.WAITING_S = 1; distributed.place_in_cluster(3)", environment
    )
    assert re.search(
        r"waiting +[1-9] s: the address of the first host is not known yet", done.stderr
    ), done.stderr
    assert "This cluster does not say where the processes meet" in done.stderr.splitlines()[-1]


def test_only_errors_that_a_lost_process_causes_count_as_one(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = jax.errors.JaxRuntimeError
    assert distributed.is_lost_peer(
        error("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    )
    assert distributed.is_lost_peer(error("UNAVAILABLE: Task 1 heartbeat timeout"))
    lost = distributed.lost_peer(error("UNAVAILABLE: heartbeat.\nmore"), remedy="start again")
    assert str(lost) == "Another process of this run is gone (UNAVAILABLE: heartbeat); start again."
    assert distributed.lost_peer(error("INVALID_ARGUMENT: shapes"), remedy="") is None
    assert distributed.is_lost_peer(
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    )
    assert not distributed.is_lost_peer(
        error("RESOURCE_EXHAUSTED: out of memory while UNAVAILABLE")
    )
    assert not distributed.is_lost_peer(error("INVALID_ARGUMENT: shapes"))
    assert not distributed.is_lost_peer(ValueError("UNAVAILABLE"))
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert not distributed.is_lost_peer(error("UNAVAILABLE: Task 1 heartbeat timeout"))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_may_be_started_again(runs, killed):
    team = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    workdir = runs.directory / f"killed-{killed}"
    knobs = (
        "num_steps=1000000",
        "checkpoint.every_steps=1000000",
        "evaluation.every_steps=0",
        "log.tensorboard=False",
        "distributed.heartbeat_timeout_s=10",
    )
    processes = [
        runs.start(workdir, *knobs, environment={**team, "JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]
    seen = []
    for line in processes[0].stderr:  # until steps are done
        seen.append(line)
        if line.startswith("step "):
            break
    processes[killed].kill()
    _, log = processes[1 - killed].communicate(timeout=120)
    assert processes[1 - killed].returncode == 42, "".join(seen) + log
    assert "the same command continues" in log
    processes[killed].communicate()
