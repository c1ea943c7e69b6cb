"""Processes of `llada-jax` that need not import anything: they are forked from one that has.

Importing JAX, Orbax and grain takes three CPU seconds, about as long as a tiny run. A server that
has imported them forks a child for each command; it has started no thread and asked JAX for no
device, so that it may. The children are processes like any other: they have their own environment,
folder, output and exit status, and are killed for real.
"""

import array
import gc
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# ---- in the tests


class Server:
    """Starts the server with the first command; one per process of the tests."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.statuses: dict[int, int] = {}
        self.connection: socket.socket | None = None
        self.received = b""

    def start(self, words: list[str], environment: dict[str, str]) -> "Process":
        """Returns `llada-jax WORDS` as a running process with this environment."""
        with self.lock:
            if self.connection is None:
                self.connection, theirs = socket.socketpair()
                subprocess.Popen(
                    [sys.executable, "-m", "support.fork_server", str(theirs.fileno())],
                    env={**os.environ, "PYTHONPATH": _path_of_modules()},
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
                theirs.close()
            (out, out_end), (err, err_end) = os.pipe(), os.pipe()
            request = {"words": words, "environment": environment, "folder": os.getcwd()}
            text = json.dumps(request).encode()
            header = len(text).to_bytes(4, "big")
            ends = array.array("i", [out_end, err_end])
            self.connection.settimeout(None)
            self.connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)])
            self.connection.sendall(text)
            os.close(out_end)
            os.close(err_end)
            while (pid := self._read(None)) is None:
                pass
        return Process(self, pid, out, err)

    def status(self, pid: int) -> int | None:
        """Returns the exit status of a child, of a signal its negative number; None: it runs."""
        with self.lock:
            while pid not in self.statuses and self._read(0) is not None:
                pass
            return self.statuses.get(pid)

    def _read(self, timeout: float | None) -> int | None:
        """Reads one message; returns the child that has started, 0 for one that has ended, and
        None when there was none in time.
        """
        assert self.connection is not None
        self.connection.settimeout(timeout)
        while b"\n" not in self.received:
            try:
                more = self.connection.recv(4096)
            except (BlockingIOError, TimeoutError):
                return None
            assert more, "the server of forked processes has ended"
            self.received += more
        line, _, self.received = self.received.partition(b"\n")
        message = json.loads(line)
        if "status" not in message:
            return message["pid"]
        self.statuses[message["pid"]] = message["status"]
        return 0 if timeout == 0 else None


class Process:
    """The part of subprocess.Popen that the tests use."""

    def __init__(self, server: Server, pid: int, out: int, err: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.status(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.005)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        outputs = ["", ""]

        def read(number: int, file: io.TextIOBase) -> None:
            outputs[number] = file.read()
            file.close()

        threads = [
            threading.Thread(target=read, args=(number, file), daemon=True)
            for number, file in enumerate((self.stdout, self.stderr))
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return outputs[0], outputs[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


SERVER = Server()


def _path_of_modules() -> str:
    here = str(Path(__file__).parent.parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


# ---- in the server

STARTED_WITH = dict(os.environ)
# Variables that a run reads when it starts, and not JAX when it is imported.
READ_LATE = {
    "JAX_NUM_CPU_DEVICES",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "XLA_FLAGS",
}


def serve(connection: socket.socket) -> None:
    """Forks a child for every request until the tests close the connection."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    # the tests stop their processes, and Ctrl-C at a terminal reaches the server too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == ended:
                os.read(ended, 4096)
                report_ended(connection)
                continue
            header, rights, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(2 * 4))
            if not header:
                return
            size, text = int.from_bytes(header, "big"), b""
            while len(text) < size:
                text += connection.recv(size - len(text))
            ends = array.array("i", rights[0][2])
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for descriptor in (connection.detach(), ended, wake):
                    os.close(descriptor)
                selector.close()
                sys.exit(run(json.loads(text), *ends))
            for end in ends:
                os.close(end)
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def report_ended(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        message = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
        connection.sendall(json.dumps(message).encode() + b"\n")


def run(request: dict, out: int, err: int) -> int:
    """Becomes the command, and returns its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, end in ((1, out), (2, err)):
        os.dup2(end, number)
        os.close(end)
    os.chdir(request["folder"])
    before, after = STARTED_WITH, request["environment"]
    changed = {
        name
        for name in before.keys() | after.keys()
        if name.startswith(("JAX_", "XLA_")) and before.get(name) != after.get(name)
    }
    assert changed <= READ_LATE, f"read when JAX was imported: {changed - READ_LATE}"
    os.environ.clear()
    os.environ.update(request["environment"])
    import jax

    jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", -1)))
    sys.argv = ["llada-jax", *request["words"]]
    return main(request["words"])


if __name__ == "__main__":
    from support.forked_runs import main

    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
