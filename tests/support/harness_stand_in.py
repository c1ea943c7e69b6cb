"""A stand-in for lm-evaluation-harness, of which HarnessModel needs two names."""

import sys
import types


def put_harness_in_place(monkeypatch) -> None:
    """Lets HarnessModel find the stand-in for the rest of a test."""
    api = types.ModuleType("lm_eval.api.model")
    api.LM = types.SimpleNamespace(register=lambda model: None)
    api.CacheHook = lambda lm: types.SimpleNamespace(add_partial=lambda *_: None)
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)


class Request:
    """What the harness asks, as much of it as HarnessModel reads."""

    task_name, doc_id = "task", 0

    def __init__(self, *args):
        self.args = args
