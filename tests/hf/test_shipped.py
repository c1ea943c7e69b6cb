"""The PyTorch files of an export work in both versions of transformers, without this package: what
is checked is in shipped_checks/.
"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paths import PUBLISHED
from support.transformers_versions import VERSIONS, run_python

import llada_jax
from llada_jax.rng import key_for, keys_for_rows
from llada_jax.samplers.choice import keep_likely
from llada_jax.samplers.text import generate_tokens

FOLDER = Path(__file__).parent / "shipped_checks"
CHECKS = ("loading", "network", "loss", "sampler", "rules", "generating")
# --noconftest: the conftest.py of these tests imports this package.
RUN = """
import pytest, transformers
print("with transformers", transformers.__version__)
folder, *words = sys.argv[1:]
sys.path.insert(0, folder)
quiet = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*quiet, "-p", "exported", *words]))
"""


PROMPTS = [[7, 301, 12, 44, 9], [250, 33]]
# Every commit rule, order, cache, rule that revises and treatment of the end of a text once:
# greedy, so that both samplers must reveal the same tokens in the same steps. What ReMDM draws is
# handed over.
REQUESTS = [
    {"commit": "schedule", "steps": 12},
    {"remasking": "entropy", "steps": 15},
    {"remasking": "margin", "steps": 9},
    {"commit": "threshold", "cfg_scale": 0.5},
    {"commit": "threshold=0.6", "eos": "last"},
    {"commit": "factor", "stop_at_eos": True},
    {"commit": "frechet", "append": True},
    {"commit": "entropy", "eos": "never"},
    {"commit": "entropy=0.5", "cache": "prefix", "stop_at_eos": True},
    {"commit": "factor=2", "cache": "prefix", "refresh": 3},
    {"commit": "frechet=0.1", "cache": "dual", "refresh": 2, "append": True},
    {"commit": "entropy=0.5", "cache": "dual"},
    {"commit": "threshold=0.2", "revise": "wino", "cfg_scale": 0.5},
    {"commit": "threshold=0.1", "revise": "wino=0.6", "append": True},
    {"revise": "remdm-cap=0.3"},
    {"revise": "remdm-rescale=0.6", "commit": "factor"},
    {"revise": "remdm-loop=0.5", "eos": "last"},
]
# (top_k, top_p) of what may be drawn
LIKELY = [(5, 1.0), (0, 0.7), (20, 0.5), (1, 1.0), (0, 1e-9), (1000, 1.0)]
SEED = 3


@jax.jit
def draws_of_remdm(step: int) -> jax.Array:
    """Returns the uniform numbers that a step of the schedule draws, [rows, positions of a block]:
    they follow from the seed, the step and the row.
    """
    key, rows = key_for("sampling", SEED), jnp.arange(len(PROMPTS))
    keys_B = keys_for_rows(jax.random.fold_in(key, step), rows)
    of_rule_B = jax.vmap(jax.random.split)(keys_B)[:, 1]
    own_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(of_rule_B, 1)
    return jax.vmap(lambda key: jax.random.uniform(key, (8,)))(own_B)


@pytest.fixture(scope="module")
def samples_in_jax(tmp_path_factory) -> Path:
    """What the sampler of this package makes of REQUESTS, step by step: a directory with the
    settings and, under "request N", arrays [steps, rows, generated columns], under "draws N" the
    numbers that ReMDM drew, and under "logits" and "likely N" what may be drawn of a distribution.

    The head of the fixture is multiplied by 8: its own distributions are so flat that no rule
    would ever be sure.
    """
    model = llada_jax.load(PUBLISHED)
    params = {**model.params, "lm_head": 8 * model.params["lm_head"]}
    shared = {"gen_length": 24, "block_length": 8}
    ids = {"mask_id": model.tokenizer.mask_id, "pad_id": model.tokenizer.pad_id}

    def steps_of(settings: dict) -> tuple[np.ndarray, np.ndarray]:
        """Returns the states after every pass, and what ReMDM draws in it."""
        seen, blocks = [], []

        def on_step(rows, state):
            seen.append(jax.device_get(state.canvas_BT))
            blocks.append(state.block - 1)

        generate_tokens(
            model.model.logits_fn,
            params,
            PROMPTS,
            cached_fn=model.model.cached_fn,
            shadow_fn=model.model.shadow_fn,
            on_step=on_step,
            seed=SEED,
            **ids,
            **shared,
            **settings,
        )
        steps = settings.get("steps", shared["gen_length"]) // 3
        draws = [
            draws_of_remdm(block * steps + number - blocks.index(block))
            for number, block in enumerate(blocks)
        ]
        return np.stack(seen)[:, :, -shared["gen_length"] :], np.stack(draws)

    first = steps_of({})[0][-1]
    # Two tokens that are generated early and late, so that the rows end at different blocks.
    ends = [int(first[0, 3]), int(first[1, 10])]
    found = {}
    for number, settings in enumerate(REQUESTS):
        ours = {"stop_at_eos": False, **settings, "eos_id": ends}
        found[f"request {number}"], found[f"draws {number}"] = steps_of(ours)
    # with ties, which whole numbers have
    logits = np.random.default_rng(0).integers(-6, 6, (2, 3, 50)).astype(np.float32) / 2
    for number, (top_k, top_p) in enumerate(LIKELY):
        kept = keep_likely(jnp.asarray(logits), top_k=jnp.int32(top_k), top_p=jnp.float32(top_p))
        found[f"likely {number}"] = np.asarray(kept) > -np.inf
    found["logits"] = logits
    directory = tmp_path_factory.mktemp("samples_in_jax")
    np.savez(directory / "steps.npz", **found)
    requests = [shared | one for one in REQUESTS]
    facts = {"prompts": PROMPTS, "requests": requests, "ends": ends, "likely": LIKELY}
    (directory / "requests.json").write_text(json.dumps(facts))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_an_export_work_where_transformers_is(
    version, samples_in_jax, monkeypatch, tmp_path
):
    monkeypatch.setenv("SAMPLES_IN_JAX", str(samples_in_jax))
    files = [FOLDER / f"{name}.py" for name in CHECKS]
    scratch = f"--basetemp={tmp_path / 'checks'}"
    output = run_python(version, RUN, FOLDER, *files, scratch, home=tmp_path, timeout=600)
    number = {"4.49.0": r"4\.49\.0", "installed": r"5\.\d"}[version]
    assert re.search(f"with transformers {number}", output), output
    # and nothing skipped
    assert re.search(r"^\d{2,} passed(, \d+ warnings?)? in ", output, flags=re.MULTILINE), output


def test_every_file_of_checks_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*CHECKS, "exported"}
