"""Rows that end at EOS, against plain numpy, at temperature 0 and above.

The toy network looks at every token, so that an EOS in a block that is not finished would change
what the rest of the block becomes.
"""

import numpy as np
import pytest
from support.reference_sampler import reference_generate
from support.toy_networks import EOS, MASK, PAD, toy_logits, toy_params

from llada_jax.samplers.text import generate_tokens

SECOND_END = 13
SCHEDULE = {"gen_length": 12, "block_length": 6, "steps": 8}
PROMPTS = [[1, 2, 3], [], [4] * 5, [5, EOS, 6], [7], [8, 9], [10, 11, 12, 13], [3, 3], [2], [6, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rows_end_at_eos_as_in_plain_numpy_and_only_in_finished_blocks(temperature):
    request = {**SCHEDULE, "eos_id": EOS, "temperature": temperature, "seed": 3}
    params = toy_params(1)
    # such that EOS is met often
    params["out"][:, EOS] *= 2.5
    tokens_BT, _ = generate_tokens(toy_logits, params, PROMPTS, mask_id=MASK, pad_id=PAD, **request)
    num_ended = num_differing = 0
    for row, prompt in enumerate(PROMPTS):
        expected = reference_generate(params, prompt, row=row, **request)
        np.testing.assert_array_equal(tokens_BT[row], expected)
        num_ended += bool(EOS in expected[:-1])
        early = reference_generate(params, prompt, row=row, ends_early=True, **request)
        num_differing += bool((early != expected).any())
    assert num_ended >= 2
    # the rows by which a sampler that ends rows too early would be seen
    assert num_differing >= 1


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("eos", ["never", "last"])
def test_ends_that_are_off_or_kept_last_are_those_of_plain_numpy(eos, temperature):
    """With a second end, which is kept last too but never off."""
    params = toy_params(1)
    params["out"][:, [EOS, SECOND_END]] *= 2.5
    request = {
        **SCHEDULE,
        "eos_id": [EOS, SECOND_END],
        "temperature": temperature,
        "seed": 3,
    }
    tokens_BT, _ = generate_tokens(
        toy_logits, params, PROMPTS, mask_id=MASK, pad_id=PAD, eos=eos, **request
    )
    num_differing = 0
    for row, prompt in enumerate(PROMPTS):
        expected = reference_generate(params, prompt, row=row, eos=eos, **request)
        np.testing.assert_array_equal(tokens_BT[row], expected)
        free = reference_generate(params, prompt, row=row, **request)
        num_differing += bool((free != expected).any())
    assert num_differing >= 2
