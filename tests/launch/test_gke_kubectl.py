"""launch/gke.py with a real kubectl, which talks to a stand-in for the Kubernetes API."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gke
import pytest
import yaml
from support.gke_manifests import COMMAND, render
from support.paths import LAUNCH


class Api(BaseHTTPRequestHandler):
    """As much of a Kubernetes API as `kubectl apply`, `logs` and `delete` of a JobSet ask for."""

    jobsets, asked = {}, []
    pods = ["run-slice-job-0-0-aaaaa", "run-slice-job-0-1-bbbbb"]

    def answer(self, content, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header(
            "Content-Type", "text/plain" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resources(self, group: str, *kinds: tuple[str, str]) -> dict:
        verbs = ["get", "list", "create", "delete", "patch", "watch"]
        each = {"namespaced": True, "verbs": verbs}
        listed = [
            {"name": name, "singularName": name[:-1], "kind": kind, **each} for name, kind in kinds
        ]
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": group,
            "resources": listed,
        }

    def missing(self) -> None:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": "NotFound",
            "code": 404,
        }
        self.answer({**status, "message": "not found"}, 404)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.asked.append(self.path)
        group = {"groupVersion": "jobset.x-k8s.io/v1alpha2", "version": "v1alpha2"}
        known = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": "jobset.x-k8s.io", "versions": [group], "preferredVersion": group}
                ],
            },
            "/api/v1": self.resources("v1", ("pods", "Pod"), ("configmaps", "ConfigMap")),
            "/apis/jobset.x-k8s.io/v1alpha2": self.resources(
                group["groupVersion"], ("jobsets", "JobSet")
            ),
            "/openapi/v3": {
                "paths": {
                    "apis/jobset.x-k8s.io/v1alpha2": {"serverRelativeURL": "/openapi/v3/jobset"}
                }
            },
            # This says that the server itself checks the fields; kubectl then does not.
            "/openapi/v3/jobset": {
                "openapi": "3.0.0",
                "info": {"title": "", "version": ""},
                "paths": {
                    "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets/{name}": {
                        "patch": {
                            "parameters": [{"name": "fieldValidation", "in": "query"}],
                            "responses": {},
                            "x-kubernetes-group-version-kind": {
                                "group": "jobset.x-k8s.io",
                                "version": "v1alpha2",
                                "kind": "JobSet",
                            },
                        }
                    }
                },
            },
            "/api/v1/namespaces/team/configmaps": {
                "kind": "ConfigMapList",
                "apiVersion": "v1",
                "items": [],
            },
            "/api/v1/namespaces/team/pods": {
                "kind": "PodList",
                "apiVersion": "v1",
                "items": [
                    {
                        "metadata": {"name": pod, "namespace": "team"},
                        "spec": {"containers": [{"name": gke.CONTAINER}]},
                    }
                    for pod in self.pods
                ],
            },
        }
        log = re.fullmatch(r"/api/v1/namespaces/team/pods/(.*)/log", path)
        jobset = re.fullmatch(r"/apis/jobset.x-k8s.io/v1alpha2/namespaces/team/jobsets/(.*)", path)
        if log:
            self.answer(f"step 1 of {log.group(1)}\n".encode())
        elif jobset and jobset.group(1) in self.jobsets:
            self.answer(self.jobsets[jobset.group(1)])
        elif path in known:
            self.answer(known[path])
        elif re.fullmatch(r"/api/v1/namespaces/team/pods/.*", path):
            (pod,) = [
                p
                for p in known["/api/v1/namespaces/team/pods"]["items"]
                if path.endswith(p["metadata"]["name"])
            ]
            self.answer(pod)
        else:
            self.missing()

    def do_POST(self):
        manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.jobsets[manifest["metadata"]["name"]] = manifest
        self.answer(manifest, 201)

    def do_DELETE(self):
        self.asked.append(f"DELETE {self.path}")
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.jobsets.pop(name, None):
            self.answer(
                {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Success",
                    "details": {"name": name, "uid": "1"},
                }
            )
        else:
            self.missing()

    def log_message(self, *args):
        pass


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A Kubernetes API on loopback, which kubectl finds through its environment."""
    # This may be skipped in CI too: Debian's kubectl is 1.20, which does not find the resource that
    # this API offers to the ones in use (seen with 1.32), and no other is at hand.
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed here")
    Api.jobsets, Api.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [cluster],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    # kubectl keeps a cache of what the API offers in the home directory.
    monkeypatch.setenv("HOME", str(tmp_path))
    yield Api
    server.shutdown()
    thread.join()
    server.server_close()


def launch(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LAUNCH / "gke.py"), "--name", "run", "--namespace=team", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_kubectl_sends_the_manifest_shows_the_logs_of_all_hosts_and_deletes(api):
    flags = ["--image", "image:1", "--unchecked", "--topology", "v5p-16"]
    done = launch(*flags, "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    sent = api.jobsets["run"]
    sent["metadata"] = {key: value for key, value in sent["metadata"].items() if key != "namespace"}
    del sent["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"]
    assert sent == render(*flags)

    done = launch("--follow")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {
        f"[pod/{pod}/trainer] step 1 of {pod}" for pod in api.pods
    }
    assert any("labelSelector=jobset.sigs.k8s.io%2Fjobset-name%3Drun" in path for path in api.asked)

    assert launch("--delete").returncode == 0
    assert not api.jobsets
    # The second time, kubectl finds nothing.
    assert launch("--delete").returncode == 1
