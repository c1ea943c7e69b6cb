"""The published settings of evaluations in lm-evaluation-harness, each with its source."""

from typing import Any, NamedTuple

from llada_jax.errors import look_up

PAPER = "LLaDA, arXiv 2502.09992, table 1 and appendix B"
SCRIPT = "github.com/ML-GSAI/LLaDA, eval_llada_lm_eval.sh"
INSTRUCT = "github.com/ML-GSAI/LLaDA, EVAL.md"


class Setting(NamedTuple):
    """How one task is asked.

    num_fewshot: examples in front of a question; None: as many as the harness's task says.
    mc_samples, cfg_scale: of likelihoods; one sample is exact where answers have one token.
    gen_length: tokens of a generated answer, one step each; None: not generated.
    block_length: of them; None: one block.
    eos: what becomes of the end-of-text token, see docs/sampling.md.
    is_chat: whether the question is written with the chat template.
    score: the published result in percent.
    """

    num_fewshot: int | None
    mc_samples: int = 128
    cfg_scale: float = 0.0
    gen_length: int | None = None
    block_length: int | None = None
    eos: str = "free"
    is_chat: bool = False
    score: float | None = None


def _with_guidance(settings: dict[str, Setting], scales: dict) -> dict[str, Setting]:
    return {
        task: settings[task]._replace(cfg_scale=scale, score=score)
        for task, (scale, score) in scales.items()
    }


_BASE = {
    "mmlu": Setting(5, mc_samples=1, score=65.9),
    "cmmlu": Setting(5, mc_samples=1, score=69.9),
    "ceval-valid": Setting(5, mc_samples=1, score=70.5),
    "arc_challenge": Setting(0, score=45.9),
    "hellaswag": Setting(0, score=70.5),
    "truthfulqa_mc2": Setting(0, score=46.1),
    "winogrande": Setting(5, score=74.8),
    "piqa": Setting(0, score=73.6),
    "gpqa_main_n_shot": Setting(5, score=25.2),
    "bbh": Setting(None, gen_length=1024, score=49.7),
    "gsm8k": Setting(4, gen_length=1024, score=70.3),
    "minerva_math": Setting(None, gen_length=1024, score=31.4),
    "humaneval": Setting(None, gen_length=1024, score=35.4),
    "mbpp": Setting(None, gen_length=1024, score=40.0),
}


def _of_chats(settings: dict[str, tuple[int, int | None, str, float]]) -> dict[str, Setting]:
    """Returns settings of (gen_length, block_length, eos, score) for models that follow
    instructions.
    """
    return {
        task: Setting(
            None, gen_length=length, block_length=block, eos=eos, is_chat=True, score=score
        )
        for task, (length, block, eos, score) in settings.items()
    }


# {preset: (source, {task of the harness: Setting})}. The published script runs with guidance where
# the paper's first table has none, so that the two do not give the same numbers.
PRESETS: dict[str, tuple[str, dict[str, Setting]]] = {
    "llada-8b-base": (PAPER, _BASE),
    "llada-8b-base-cfg": (
        SCRIPT,
        _with_guidance(
            _BASE,
            {
                "arc_challenge": (0.5, 47.9),
                "hellaswag": (0.5, 72.5),
                "truthfulqa_mc2": (2.0, 46.4),
                "winogrande": (0.0, 74.8),
                "piqa": (0.5, 74.4),
                "gpqa_main_n_shot": (0.5, 26.1),
            },
        ),
    ),
    "llada-8b-instruct": (
        INSTRUCT,
        _of_chats(
            {
                "mmlu_generative": (3, None, "free", 65.5),
                "mmlu_pro": (256, None, "free", 37.0),
                "arc_challenge_chat": (512, None, "free", 88.5),
                "gsm8k": (512, None, "last", 69.4),
                "minerva_math": (512, None, "last", 31.9),
                "gpqa_main_generative_n_shot": (64, None, "last", 33.3),
                "humaneval_instruct": (512, None, "never", 49.4),
                "mbpp_instruct": (256, None, "last", 41.0),
            }
        ),
    ),
    "llada-8b-instruct-blocks": (
        INSTRUCT,
        _of_chats({"gsm8k": (256, 8, "free", 78.6), "minerva_math": (512, 64, "free", 42.2)}),
    ),
    "llada-1.5": (
        INSTRUCT,
        _of_chats(
            {
                "gsm8k": (256, 16, "last", 83.8),
                "minerva_math": (1024, 128, "last", 42.6),
                "gpqa_main_generative_n_shot": (256, 16, "free", 36.9),
                "humaneval_instruct": (512, 32, "last", 52.4),
                "mbpp_instruct": (512, 32, "last", 42.8),
                "ifeval": (256, 16, "last", 66.2),
            }
        ),
    ),
}


def preset(name: str) -> tuple[str, dict[str, Setting]]:
    """Returns the source of a preset and its settings by task.

    Raises:
        UserError: there is no such preset.
    """
    return look_up(PRESETS, name, "preset")


def as_arguments(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of llada_jax.evaluation.harness.HarnessModel and of `run`."""
    model: dict[str, Any] = {"cfg_scale": setting.cfg_scale}
    if setting.gen_length is None:
        model["mc_samples"] = setting.mc_samples
    else:
        model |= {"gen_length": setting.gen_length, "eos": setting.eos}
        # Left out without blocks, so that gen_length can be overridden and autoregressive models
        # accept the rest.
        if setting.block_length is not None:
            model["block_length"] = setting.block_length
    asked: dict[str, Any] = {}
    if setting.num_fewshot is not None:
        asked["num_fewshot"] = setting.num_fewshot
    if setting.is_chat:
        asked["apply_chat_template"] = True
    return model, asked
