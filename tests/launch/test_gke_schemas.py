"""The manifests of launch/gke.py fit the published Kubernetes schemas and the JobSet CRD."""

import copy
import os
from pathlib import Path

import pytest
import yaml
from support.gke_manifests import REQUESTS, container_of, job_of, pod_of, render
from support.paths import ROOT
from support.required import library

CRD = Path(
    os.environ.get(
        "LLADA_JAX_JOBSET_CRD", ROOT.parent / "shared/schemas/jobset.x-k8s.io_jobsets.yaml"
    )
)


def check_core(manifest: dict) -> None:
    """Validates the Job and the Pod within a JobSet against the published schemas; unknown fields
    are errors.
    """
    validate = library("kubernetes_validate").validate
    for version in ("1.31", "1.35"):
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job"},
            **job_of(manifest),
        }
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(pod_of(manifest))}
        pod["metadata"] = {"name": "pod", **pod.get("metadata", {})}
        validate(job, version, strict=True)
        validate(pod, version, strict=True)


def closed(schema: dict) -> dict:
    """Returns a CRD's schema as JSON Schema in which a field that is not described is an error, as
    `kubectl apply` has it.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {
        key: value
        for key, value in schema.items()
        if key not in ("default", "description", "format")
    }
    if "properties" in schema:
        schema["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


@pytest.fixture(scope="module")
def check_jobset():
    """Validates a manifest against the JobSet CRD."""
    # This is skipped in CI too, because there is nowhere to fetch the file from.
    if not CRD.exists():
        pytest.skip("no JobSet CRD; put its path into LLADA_JAX_JOBSET_CRD")
    # kubernetes-validate depends on jsonschema.
    jsonschema = library("jsonschema")

    (version,) = [
        v for v in yaml.safe_load(CRD.read_text())["spec"]["versions"] if v["name"] == "v1alpha2"
    ]
    schema = closed(version["schema"]["openAPIV3Schema"])
    # The API server itself checks the metadata.
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(schema)
    return validator.validate


@pytest.mark.parametrize("request_", REQUESTS)
def test_jobs_and_pods_fit_the_kubernetes_schemas(request_):
    check_core(render(*REQUESTS[request_]))


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_jobset_fits_its_crd(request_, check_jobset):
    check_jobset(render(*REQUESTS[request_]))


def test_the_validators_reject_wrong_fields(check_jobset):
    """Without this, the two tests above could pass for validators that accept anything."""
    for path, key in (
        ("spec", "maxRestarts"),
        ("pod", "hostnetwork"),
        ("container", "environment"),
    ):
        manifest = render("--topology", "v5p-128")
        place = {
            "spec": manifest["spec"],
            "pod": pod_of(manifest)["spec"],
            "container": container_of(manifest),
        }[path]
        place[key] = 1
        with pytest.raises(Exception, match=key):
            check_jobset(manifest)
        if path != "spec":
            with pytest.raises(Exception, match=key):
                check_core(manifest)
    manifest = render("--topology", "v5p-128")
    del manifest["spec"]["failurePolicy"]["rules"][0]["name"]
    with pytest.raises(Exception, match="name"):
        check_jobset(manifest)
