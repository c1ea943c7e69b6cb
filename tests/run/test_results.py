"""What a run has reached, as Python code gets it."""

import json

from llada_jax.run.results import trained_run


def test_the_final_bounds_of_a_mixture_are_those_of_every_source(tmp_path):
    final = {"final_0_web": {"nelbo": 2.0}, "final_1_code": {"nelbo": 1.0}}
    lines = [{"step": 4, "train": {"loss": 3.0}}, {"step": 4, "heldout_0_web": {}}]
    lines.append({"step": 4, **final})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert trained_run(str(tmp_path), 4) == (str(tmp_path), 4, {"loss": 3.0}, final)
