"""Presets hold the published settings, in the words that the model and the harness take."""

import pytest
from support.errors import error_of

from llada_jax.evaluation.presets import PRESETS, as_arguments, preset


def test_an_unknown_preset_names_the_one_that_was_meant():
    assert "Did you mean 'llada-8b-base'?" in error_of(preset, "llada-8b")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_source_and_a_published_score_for_each_task(name):
    source, settings = preset(name)
    assert "2502.09992" in source or "github.com" in source
    assert all(0 < setting.score < 100 for setting in settings.values())


def test_guidance_is_what_tells_the_script_from_the_paper():
    _, paper = preset("llada-8b-base")
    _, script = preset("llada-8b-base-cfg")
    assert set(script) < set(paper)
    assert {task: s._replace(cfg_scale=0.0, score=None) for task, s in script.items()} == {
        task: paper[task]._replace(score=None) for task in script
    }
    assert as_arguments(script["piqa"]) == (
        {"mc_samples": 128, "cfg_scale": 0.5},
        {"num_fewshot": 0},
    )
    generated = {"mc_samples": 128, "cfg_scale": 0.0, "gen_length": 1024}
    # the paper has four examples, where the task of the harness has five
    assert as_arguments(paper["gsm8k"]) == (generated, {"num_fewshot": 4})
    assert as_arguments(paper["bbh"]) == (generated, {})
