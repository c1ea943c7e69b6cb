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


def test_the_script_differs_from_the_paper_in_its_guidance_alone():
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
    # no blocks, which an autoregressive control would refuse
    generated = {"cfg_scale": 0.0, "gen_length": 1024, "eos": "free"}
    # the paper has four examples, where the task of the harness has five
    assert as_arguments(paper["gsm8k"]) == (generated, {"num_fewshot": 4})
    assert as_arguments(paper["bbh"]) == (generated, {})


def test_models_that_follow_instructions_are_asked_in_chats_and_keep_their_ends():
    """As docs/sampling.md says which of their evaluations need what."""
    _, whole = preset("llada-8b-instruct")
    eos = {task: setting.eos for task, setting in whole.items() if setting.eos != "free"}
    assert eos.pop("humaneval_instruct") == "never"
    assert eos == dict.fromkeys(
        ("gsm8k", "minerva_math", "gpqa_main_generative_n_shot", "mbpp_instruct"), "last"
    )
    _, blocks = preset("llada-8b-instruct-blocks")
    assert as_arguments(blocks["gsm8k"]) == (
        {"cfg_scale": 0.0, "gen_length": 256, "block_length": 8, "eos": "free"},
        {"apply_chat_template": True},
    )
    _, preferred = preset("llada-1.5")
    assert [task for task, setting in preferred.items() if setting.eos != "last"] == [
        "gpqa_main_generative_n_shot"
    ]
    for settings in (whole, blocks, preferred):
        for setting in settings.values():
            model, asked = as_arguments(setting)
            assert asked == {"apply_chat_template": True}
            assert model["gen_length"] % model.get("block_length", 1) == 0
