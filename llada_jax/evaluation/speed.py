"""How fast a model samples: tokens per second, and passes of the network per token."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.data.records import DatasetInfo, Records
from llada_jax.masks import Mask
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.text import generate_tokens

NUM_PROMPTS, PROMPT_LENGTH, GEN_LENGTH, BLOCK_LENGTH = 16, 16, 64, 32

# {name of a result: settings of llada_jax.samplers.denoise.denoise}
MODES: dict[str, dict[str, Any]] = {
    "schedule": {},
    "threshold": {"commit": "threshold=0.9"},
    "frechet_and_dual_cache": {"commit": "frechet=0.25", "cache": "dual"},
}


class Speed(NamedTuple):
    """Of one way to sample, once it is compiled.

    tokens_per_s: of all rows together. passes_per_token: passes that a row needed, a cache or not,
    over its tokens. seconds: that was measured. num_tokens: that were generated.
    """

    tokens_per_s: float
    passes_per_token: float
    seconds: float
    num_tokens: int


def first_tokens(info: DatasetInfo, *, split: str) -> list[list[int]]:
    """Returns the beginnings of rows spread over a split: NUM_PROMPTS of them, or as many as it
    has, of PROMPT_LENGTH tokens or half a row.
    """
    rows = Records(info, split=split)
    length = min(PROMPT_LENGTH, info.sequence_length // 2)
    places = np.linspace(0, len(rows) - 1, min(NUM_PROMPTS, len(rows))).astype(int)
    return [rows[place]["tokens"][:length].tolist() for place in places]


def sampling_speed(
    model: Any,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    mask: Mask,
    ids: Any,
    longest: int,
    modes: dict[str, dict[str, Any]] = MODES,
) -> dict[str, Speed]:
    """Returns the speed of each mode, on the devices where the parameters are.

    All tokens are generated, as if no text ended, so that models are compared at the same work.
    Every mode runs once to compile and is timed the second time. An autoregressive model has one
    mode, "autoregressive", and a network with a shifted output has no mode with a cache.

    Args:
        model, params: see llada_jax.models.model.Model.
        prompts: token ids of one length, in one batch.
        mask: what the network's attention sees.
        ids: mask_id, pad_id, bos_id and vocab_size, such as a tokenizer has.
        longest: tokens of a row that the model was trained on, which bounds GEN_LENGTH.
    """
    gen_length = min(GEN_LENGTH, longest - len(prompts[0]))
    request: dict[str, Any] = dict(
        mask_id=ids.mask_id,
        pad_id=ids.pad_id,
        num_ids=ids.vocab_size,
        gen_length=gen_length,
        batch_size=len(prompts),
    )
    if mask.causal:
        return {
            "autoregressive": _timed(
                lambda: continue_tokens(
                    model.cached_fn, params, prompts, bos_id=ids.bos_id, **request
                )
            )
        }
    # blocks divide the text
    request["block_length"] = gen_length if gen_length % BLOCK_LENGTH else BLOCK_LENGTH

    def sample(settings: dict[str, Any]) -> Callable:
        return lambda: generate_tokens(
            model.logits_fn, params, prompts, cached_fn=model.cached_fn, **request, **settings
        )

    has_cache = not model.architecture.output_shift
    return {
        name: _timed(sample(settings))
        for name, settings in modes.items()
        if has_cache or settings.get("cache", "none") == "none"
    }


def _timed(sample: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Speed:
    sample()
    began = time.perf_counter()
    tokens_BT, num_steps_B = sample()
    seconds = time.perf_counter() - began
    return Speed(
        tokens_BT.size / seconds, float(num_steps_B.sum()) / tokens_BT.size, seconds, tokens_BT.size
    )
