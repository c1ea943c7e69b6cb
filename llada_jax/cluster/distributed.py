"""Joining the other processes of a run, and leaving when one of them is gone.

JAX's own distributed runtime does the work. But when a process has lost another one, its heartbeat
ends it with SIGABRT, and its exit handler waits minutes for processes that will not come. Both
would hide from a scheduler that the run should be started again. Here a lost process and a start
that times out end with status 42, and say why in one sentence; watchdog.py does the same for a step
that hangs.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import jax

from llada_jax.cluster.compilation_cache import write_from_every_process
from llada_jax.errors import LostPeer, UserError, reason
from llada_jax.streams import write_line

# Seconds between two lines about who is missing at the start.
WAITING_S = 15.0
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# Words of JAX's errors when another process, or the way to it, is gone: status codes, and the
# libraries that do the collectives of CPUs and GPUs.
_LOST = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "CANCELLED",
    "Gloo",
    "gloo",
    "NCCL",
    "heartbeat",
    "oordination",
)
# Memory and bugs, where starting again does not help. They win, because their messages may quote
# any of the words above.
_NOT_LOST = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


def initialize(
    *,
    initialization_timeout_s: int = 300,
    heartbeat_timeout_s: int = 100,
    saves_at_sigterm: bool = True,
) -> None:
    """Joins the other processes of the run; does nothing where the environment names none.

    The first of these that is there decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (all three, or none), as the launchers set them; the tasks of an `srun`; the
    hosts of a TPU slice (GKE and Cloud TPU VMs), which JAX finds by itself.

    Args:
        initialization_timeout_s: how long the processes wait for each other.
        heartbeat_timeout_s: a process that has not been heard of for so long counts as lost, and
            all others end.
        saves_at_sigterm: JAX catches SIGTERM, for a StopRequest to tell all processes; False: it
            ends the process, as it does a process that is alone.

    Raises:
        UserError: the environment contradicts itself, or names only some of the hosts.
        LostPeer: the other processes did not join in time, or the first one cannot listen.
    """
    if jax.distributed.is_initialized():
        return
    arguments = explicit_arguments(os.environ)
    check_device_ids(os.environ)
    check_slices(os.environ)
    if arguments is None and not is_cluster(os.environ):
        return
    check_hosts(os.environ, arguments)
    leave_no_proxy(os.environ, arguments)
    place = arguments or place_in_cluster(initialization_timeout_s)
    if place["num_processes"] == 1:
        return
    where = "{coordinator_address} as process {process_id} of {num_processes}".format(**place)
    write_line(f"joining     {where}, for at most {initialization_timeout_s} s")
    began = time.monotonic()
    remedy = (
        "check that the same command runs on every host and that each can reach that address and "
        "port, then start all of them again"
    )
    _on_abort(
        lambda: (
            f"Not all processes met within {initialization_timeout_s} s at {where} "
            f"({who_has_joined(place)}); {remedy}."
        )
    )
    check_port(os.environ, place)
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)
    try:
        with reporting_wait(lambda: who_has_joined(place)):
            jax.distributed.initialize(
                # Without arguments JAX asks the cluster again: it needs more of the answer than
                # `place` holds, to choose the devices of each process.
                **(arguments or {}),
                **bind_to_loopback(place),
                initialization_timeout=initialization_timeout_s,
                heartbeat_timeout_seconds=heartbeat_timeout_s,
            )
    # Of a variable that only JAX reads.
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The environment of this process cannot be used ({_first_line(error)}); check "
            "JAX_LOCAL_DEVICE_IDS and the other JAX_* variables."
        ) from error
    # JaxRuntimeError is one too: an obstacle that JAX meets before the waiting begins.
    except RuntimeError as error:
        raise LostPeer(
            f"The processes could not meet at {where} ({_first_line(error)}); {remedy}."
        ) from error
    write_from_every_process()
    again = (
        "the same command continues the run"
        if saves_at_sigterm
        else "start the same command again on all hosts"
    )
    _on_abort(
        lambda: (
            "The runtime has ended this process, most likely because another one is gone (its "
            f"message is above); {again}."
        )
    )
    write_line(
        f"joined      {jax.process_count()} processes in {time.monotonic() - began:.1f} s; this is "
        f"number {jax.process_index()}"
    )


def bind_to_loopback(place: dict) -> dict:
    """Returns the argument that lets the coordinator of a run on one machine listen there only.

    It serves whoever connects, without a password, and by default on all interfaces. Between hosts
    it has to; there the network keeps strangers away (docs/launch.md).
    """
    host, _, port = place["coordinator_address"].rpartition(":")
    if host == "localhost" or host.startswith("127."):
        address = "127.0.0.1" if host == "localhost" else host
        return {"coordinator_bind_address": f"{address}:{port}"}
    return {}


def check_port(environment, place: dict) -> None:
    """Raises LostPeer in the first process when it cannot listen where the others look for it.

    JAX would end in a segmentation fault, or share the port with the coordinator of another run.
    """
    if place["process_id"] or "JAX_COORDINATOR_BIND_ADDRESS" in environment:
        return
    address = place["coordinator_address"]
    port = int(address.rpartition(":")[2])
    # "": all interfaces
    host = bind_to_loopback(place).get("coordinator_bind_address", "").rpartition(":")[0]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise LostPeer(
                f"The first process cannot listen at {address} ({reason(error)}); end what listens "
                "there, such as an earlier start of this run, or choose another port, then start "
                "all processes again."
            ) from error


def meet(name: str, *, timeout_s: int) -> None:
    """Waits until every process has called it with this name, for at most `timeout_s` (0: a day).

    Call it before a first collective. There gloo waits only 30 s for the other processes, and one
    that still compiles takes longer: the others may have found their programs in the compilation
    cache.
    """
    if jax.process_count() > 1:
        # The barriers of the public API are collectives themselves.
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier(name, (timeout_s or 86_400) * 1000)  # type: ignore[union-attr]


def explicit_arguments(environment) -> dict | None:
    """Returns the arguments that the launcher's three variables state, None if none is set."""
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if not given:
        return None
    missing = [name for name in EXPLICIT if name not in given]
    if missing:
        raise UserError(
            f"{', '.join(given)} is set but {', '.join(missing)} is not; set all three or none."
        )
    address, count, number = (given[name] for name in EXPLICIT)
    try:
        count, number = int(count), int(number)
    except ValueError as error:
        raise UserError(
            f"{EXPLICIT[1]}={count} and {EXPLICIT[2]}={number} must be integers."
        ) from error
    if not 0 <= number < count:
        raise UserError(
            f"{EXPLICIT[2]}={number} must lie between 0 and {EXPLICIT[1]} - 1 = {count - 1}."
        )
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise UserError(
            f"{EXPLICIT[0]}={address} has no {'host' if colon else 'port'}; write HOST:PORT, the "
            "same in every process."
        )
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(
            f"{EXPLICIT[0]}={address}: the port {port!r} must be a number between 1 and 65535; "
            "write HOST:PORT, the same in every process."
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def check_device_ids(environment) -> None:
    """Raises UserError unless JAX_LOCAL_DEVICE_IDS, where it is set, lists numbers."""
    ids = environment.get("JAX_LOCAL_DEVICE_IDS")
    if ids is not None and not re.fullmatch(r"\d+(,\d+)*", ids):
        raise UserError(
            f"The environment variable JAX_LOCAL_DEVICE_IDS={ids!r} must list numbers of devices, "
            "as in 0,1; correct it, or unset it."
        )


def check_slices(environment) -> None:
    """Raises UserError for a variable of several TPU slices (MEGASCALE_*) that cannot be.

    libtpu reads them and would wait for slices that do not exist. Outside of a slice they mean
    nothing.
    """
    if not slice_hosts(environment):
        return
    num_slices = number_in(environment, "MEGASCALE_NUM_SLICES", 1)
    number = number_in(environment, "MEGASCALE_SLICE_ID", 0, least=0)
    port = number_in(environment, "MEGASCALE_PORT", 1)
    if "MEGASCALE_NUM_SLICES" in environment and number >= num_slices:
        raise UserError(
            f"The environment variable MEGASCALE_SLICE_ID={number} must be less than "
            f"MEGASCALE_NUM_SLICES={num_slices}; correct it, or unset it."
        )
    if port >= 2**16:
        raise UserError(
            f"The environment variable MEGASCALE_PORT={port} must be at most 65535; correct it, or "
            "unset it."
        )
    if environment.get("MEGASCALE_COORDINATOR_ADDRESS") == "":
        raise UserError(
            "The environment variable MEGASCALE_COORDINATOR_ADDRESS is empty; name the first host "
            "of the first slice, or unset it."
        )


def is_cluster(environment) -> bool:
    """Whether a scheduler or a TPU slice started this process as one of several.

    JAX can then find the others by itself. SLURM_NTASKS alone does not mean that: it is also set in
    the batch script, which runs once.
    """
    if is_step_of_several(environment):
        return True
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    has_chips = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    return len(slice_hosts(environment)) > 1 or (
        has_chips and importlib.util.find_spec("libtpu") is not None
    )


def is_step_of_several(environment) -> bool:
    """Whether srun started this process as one of several.

    Outside of a step the other variables of SLURM mean nothing to a process.
    """
    return "SLURM_STEP_NODELIST" in environment and number_in(environment, "SLURM_NTASKS", 1) > 1


def number_in(environment, name: str, default: int, *, least: int = 1) -> int:
    """Returns the integer that a variable holds; UserError when it holds something else.

    A variable that is set and empty is a mistake of the script that set it, and not the default.
    """
    text = environment.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(
            f"The environment variable {name}={text!r} must be an integer of at least {least}; "
            "correct it, or unset it."
        )
    return int(text)


def slice_hosts(environment) -> list[str]:
    """Returns the hosts of the TPU slice of this host, as GKE names them; [] elsewhere."""
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return [host for host in named.split(",") if host]


def num_slice_hosts(environment) -> int:
    """Returns how many hosts the TPU slices of this run have together, 0 outside of a slice."""
    if hosts := slice_hosts(environment):
        return len(hosts) * number_in(environment, "MEGASCALE_NUM_SLICES", 1)
    # Asks the metadata server of a Cloud TPU VM. The public jax.distributed.initialize asks it too,
    # but does not hand out the answer.
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 0


def check_hosts(environment, arguments: dict | None) -> None:
    """Raises UserError for a start on fewer hosts than the slice has.

    libtpu would wait for the other hosts forever, without a message.
    """
    # Without arguments JAX takes the number from where num_slice_hosts does; CPUs compute alone.
    if arguments is None or environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return
    num_hosts = num_slice_hosts(environment)
    if num_hosts > 1 and arguments["num_processes"] != num_hosts:
        raise UserError(
            f"JAX_NUM_PROCESSES={arguments['num_processes']}, but the TPU slices that this host "
            f"belongs to have {num_hosts} hosts, which compute only together; start one process on "
            "each."
        )


def place_in_cluster(timeout_s: int) -> dict:
    """Returns the arguments of jax.distributed.initialize, as JAX finds them in a cluster.

    Raises:
        LostPeer: the name of the first host does not resolve yet, or the cluster does not answer.
    """
    from jax._src.clusters import ClusterEnv

    try:
        with reporting_wait(lambda: "the address of the first host is not known yet"):
            address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, timeout_s
            )
    except RuntimeError as error:
        raise LostPeer(
            f"This cluster does not say where the processes meet ({_first_line(error)})."
        ) from error
    # JAX reads the variables of the scheduler as they are. Starting again would not change them.
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            "The variables of the scheduler (SLURM_*, TPU_*, MEGASCALE_*) do not say where the "
            f"processes meet ({type(error).__name__}: {_first_line(error)}); start this process "
            "with srun or the launcher of the cluster, or unset those variables."
        ) from error
    if None in (address, count, number) and is_step_of_several(os.environ):
        raise UserError(
            f"SLURM started {os.environ['SLURM_NTASKS']} tasks, but the other variables SLURM_* "
            "are incomplete, and each task would train alone; start the command with srun and pass "
            "its whole environment on."
        )
    # A host with chips that belongs to no slice is alone.
    if None in (address, count, number):
        return {"coordinator_address": "", "num_processes": 1, "process_id": 0}
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}  # type: ignore[arg-type]


def leave_no_proxy(environment, arguments: dict | None) -> None:
    """Keeps the traffic between the processes away from a proxy.

    A proxy would swallow it: jax warns, and then hangs.
    """
    if any(
        environment.get(name)
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    ):
        host = arguments["coordinator_address"].rsplit(":", 1)[0] if arguments else "*"
        for name in ("no_proxy", "no_grpc_proxy"):
            environment[name] = ",".join(filter(None, (environment.get(name), host)))


def who_has_joined(place: dict) -> str:
    """Returns what this process can find out about who has joined.

    Process 0 counts the connections to its port; the others try to connect to it.
    """
    host, port = place["coordinator_address"].rsplit(":", 1)
    if place["process_id"] == 0:
        return f"{num_connections(int(port))} of {place['num_processes']} have joined"
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError as error:
        return f"nothing answers there: {error}"
    return "process 0 answers there, but waits for other processes"


@contextlib.contextmanager
def reporting_wait(words):
    """Within its `with` block, prints the time waited and `words()` every WAITING_S seconds."""
    began, ended = time.monotonic(), threading.Event()

    def say() -> None:
        while not ended.wait(WAITING_S):
            write_line(f"waiting     {time.monotonic() - began:.0f} s: {words()}")

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def num_connections(port: int) -> int:
    """Returns how many established TCP connections end at a local port.

    Read from Linux's own table, in which 01 means established.
    """
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return sum(row[3] == "01" and int(row[1].rsplit(":", 1)[1], 16) == port for row in rows)


def serves_the_others() -> bool:
    """Whether the coordinator runs in this process, without which the others of a run end."""
    # jax.process_index() would ask for devices, for which the others may never come.
    from jax._src.distributed import global_state

    return global_state.process_id == 0


def will_end_with(error: UserError) -> None:
    """Makes an abort of the native runtime end this process with an error that it will raise.

    Where all processes raise one, the first takes the coordinator with it, and another may not have
    come as far by then.
    """
    _on_abort(lambda: str(error), type(error))


_KEPT_FOR_C: list[object] = []


def _on_abort(sentence, kind=LostPeer) -> None:
    """Makes an abort of the native runtime end this process with the status of an error class and
    `sentence()`.

    Otherwise it would end with SIGABRT, status 134. The heartbeat's only way to end a process is
    abort(), on a thread of its own. A handler of Python's `signal` module would never run, because
    Python runs it later, on the main thread; one that C calls runs at once.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: leave(sentence(), kind))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    # C holds only its address, and Python would free it.
    _KEPT_FOR_C.append(handler)


def leave(sentence: str, kind) -> None:
    """Ends this process at once with the status of an error class, from any thread."""
    write_line(f"llada-jax: {sentence}")
    os._exit(kind.exit_status)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of the runtime means that another process, or the way to it, is gone."""
    text = str(error)
    # The same failure is a JaxRuntimeError where a step is dispatched, and a ValueError where its
    # result is read.
    is_ours = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", text) is not None
    )
    is_ours = is_ours and jax.process_count() > 1
    return (
        is_ours
        and any(word in text for word in _LOST)
        and not any(word in text for word in _NOT_LOST)
    )


def lost_peer(error: BaseException, *, remedy: str) -> LostPeer | None:
    """Returns what to raise, or to say, for an error that `is_lost_peer`; None for any other.

    Args:
        remedy: what the same command does when it is started again, without a full stop.
    """
    if not is_lost_peer(error):
        return None
    return LostPeer(f"Another process of this run is gone ({_first_line(error)}); {remedy}.")


def _first_line(reason) -> str:
    return " ".join(str(reason).strip().split("\n")[0].split())[:300].rstrip(".")
