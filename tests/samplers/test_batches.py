"""Which rows are denoised together, when they leave, and that none of it changes a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.toy_networks import EOS, MASK, PAD, toy_logits, toy_params, windowed

from llada_jax.errors import UserError
from llada_jax.samplers.batches import by_length
from llada_jax.samplers.text import generate_tokens, infill_tokens

# 0 to 40 tokens: rows of three widths, in no order.
PROMPTS = [[1 + i % 9] * length for i, length in enumerate([3, 40, 0, 33, 7, 1, 38, 2])]


class Counted:
    """A network that writes down the shapes of the rows that it is compiled for."""

    def __init__(self, network):
        self.network, self.shapes = network, []

    def __call__(self, params, tokens_BT, *rest, **window):
        self.shapes.append(tokens_BT.shape)
        return self.network(params, tokens_BT, *rest, **window)


def sample(prompts, network=toy_logits, **changes):
    request = {"mask_id": MASK, "pad_id": PAD, "gen_length": 8, "block_length": 4} | changes
    return generate_tokens(network, toy_params(3), prompts, **request)


def test_rows_of_one_width_stand_together_in_their_order():
    lengths = [len(prompt) for prompt in PROMPTS]
    assert by_length(lengths, range(8)) == [2, 0, 4, 5, 7, 1, 3, 6]


@pytest.mark.slow
def test_results_are_in_the_given_order_whatever_the_batches_are():
    request = {"temperature": 1.0, "seed": 4}
    expected_BT, expected_B = sample(PROMPTS, batch_size=1, **request)
    for batch_size in (3, 8):
        tokens_BT, num_steps_B = sample(PROMPTS, batch_size=batch_size, **request)
        np.testing.assert_array_equal(tokens_BT, expected_BT)
        np.testing.assert_array_equal(num_steps_B, expected_B)


def test_a_row_has_the_same_text_where_rows_leave_block_by_block():
    request = {"temperature": 1.0, "seed": 4, "gen_length": 12, "eos_id": EOS}
    expected_BT, expected_B = sample(PROMPTS, batch_size=8, **request)
    tokens_BT, num_steps_B = sample(PROMPTS, batch_size=3, **request)
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    np.testing.assert_array_equal(num_steps_B, expected_B)


def test_each_width_is_compiled_once():
    network = Counted(toy_logits)
    sample(PROMPTS * 3, network, batch_size=4)
    assert sorted(network.shapes) == [(4, 40), (4, 72)]


@pytest.mark.slow
def test_gaps_are_filled_in_texts_of_all_lengths():
    texts = [[1] * 40, [2, 3], [4] * 35, [5]]
    is_given = [[i % 2 == 0 for i in range(len(text))] for text in texts]
    is_given[3] = [False]
    request = {"mask_id": MASK, "pad_id": PAD, "temperature": 1.0}
    args = (toy_logits, toy_params(1), texts, is_given)
    together, together_B = infill_tokens(*args, **request)
    alone, alone_B = infill_tokens(*args, batch_size=1, **request)
    assert together == alone
    assert together_B.tolist() == alone_B.tolist()
    assert [len(tokens) for tokens in together] == [40, 2, 35, 1]


@windowed
def ends_by_prompt(params, tokens_BT, segment_ids_BT, positions_BT):
    """Proposes EOS at the position that the first token of the row names, and token 3 elsewhere."""
    first_B = jnp.max(jnp.where((positions_BT == 0) & (segment_ids_BT > 0), tokens_BT, 0), axis=1)
    is_end_BT = positions_BT == first_B[:, None]
    return 9.0 * jnp.where(is_end_BT[..., None], jnp.eye(16)[EOS], jnp.eye(16)[3])


def passes_of(batch_size, prompts, **settings):
    """Returns the results, and the rows times passes that were computed."""
    computed = []

    def counting(params, tokens_BT, *rest, **window):
        jax.debug.callback(lambda: computed.append(tokens_BT.shape[0]))
        return ends_by_prompt(params, tokens_BT, *rest, **window)

    found = generate_tokens(
        counting,
        {},
        prompts,
        mask_id=MASK,
        pad_id=PAD,
        gen_length=12,
        block_length=2,
        batch_size=batch_size,
        **{"eos_id": EOS, **settings},
    )
    jax.effects_barrier()
    return *found, sum(computed)


@pytest.mark.slow
def test_rows_that_have_ended_make_room_for_others():
    """Prompts of one token: the text ends at the position that it names, 1 to 12."""
    prompts = [[1 + (5 * i) % 12] for i in range(16)]
    expected_BT, expected_B, _ = passes_of(1, prompts)
    tokens_BT, num_steps_B, computed = passes_of(4, prompts)
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    np.testing.assert_array_equal(num_steps_B, expected_B)
    assert num_steps_B.tolist() == [2 * -(-prompt[0] // 2) for prompt in prompts]
    # Batch after batch, each would last as long as its longest row: 4 batches of 4 rows and 10 or
    # 12 passes. Put together again, only the last rows of all are padded with copies.
    needed = int(num_steps_B.sum())
    _, _, one_by_one = passes_of(4, prompts, on_step=lambda rows, state: None)
    assert needed <= computed < needed + 4 * 6 * 2
    assert computed < one_by_one


@pytest.mark.slow
def test_rows_of_which_their_caller_has_enough_make_room_for_others():
    """The caller has enough once a finished block holds EOS, which ends no text by itself here."""
    prompts = [[1 + (5 * i) % 12] for i in range(16)]

    def is_enough(rows, state):
        finished_BT = np.asarray(state.canvas_BT)[: len(rows), -12 : state.block * 2 - 12 or None]
        return [EOS in finished_T for finished_T in finished_BT]

    tokens_BT, num_steps_B, computed = passes_of(4, prompts, eos_id=None, is_enough=is_enough)
    ends_B = [prompt[0] for prompt in prompts]
    assert [row.tolist().index(EOS) for row in tokens_BT] == [end - 1 for end in ends_B]
    assert num_steps_B.tolist() == [2 * -(-end // 2) for end in ends_B]
    assert int(num_steps_B.sum()) <= computed < int(num_steps_B.sum()) + 4 * 6 * 2


def test_who_listens_hears_of_the_rows_in_their_order():
    heard = []
    tokens_BT, _ = sample(PROMPTS, batch_size=5, on_step=lambda rows, state: heard.append(rows))
    assert heard == [range(5)] * 8 + [range(5, 8)] * 8
    np.testing.assert_array_equal(tokens_BT, sample(PROMPTS, batch_size=5)[0])
    # also where a text could end before the others, which no toy ends here
    heard.clear()
    listener = {"on_step": lambda rows, state: heard.append(rows)}
    ending_BT, _ = sample(PROMPTS, batch_size=5, eos_id=EOS, suppress=[EOS], **listener)
    assert heard == [range(5)] * 8 + [range(5, 8)] * 8
    assert EOS not in ending_BT


def test_the_noise_of_a_row_follows_from_its_number():
    request = {"temperature": 1.0, "seed": 4}
    all_BT, _ = sample([[1]] * 6, **request)
    some_BT, _ = sample([[1]] * 2, noise_numbers=[5, 1], **request)
    np.testing.assert_array_equal(some_BT, all_BT[[5, 1]])
    assert (all_BT[5] != all_BT[1]).any()


@windowed
def reads_far(params, tokens_BT, segment_ids_BT, positions_BT):
    """Proposes the number of real tokens in the row, so that it shows how far the network sees."""
    return jax.nn.one_hot((segment_ids_BT > 0).sum(axis=1)[:, None] + 0 * positions_BT, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, [26, 26, 26, 26, 26, 26]),
        ({"append": True}, [6, 10, 14, 18, 22, 26]),
        ({"lookahead": 0}, [6, 10, 14, 18, 22, 26]),
        ({"lookahead": 5}, [11, 15, 19, 23, 26, 26]),
        ({"lookahead": 99}, [26, 26, 26, 26, 26, 26]),
    ],
)
def test_the_network_sees_so_many_masks_behind_the_block(settings, seen):
    network = Counted(reads_far)
    tokens_BT, _ = generate_tokens(
        network,
        {},
        [[1, 2]],
        mask_id=63,
        pad_id=0,
        gen_length=24,
        block_length=4,
        steps=6,
        **settings,
    )
    assert tokens_BT[0, ::4].tolist() == seen
    widths = {T - 32 for _, T in network.shapes}
    assert widths <= {8, 16, 24}, "cut to pieces of a quarter of the blocks, rounded up"
    assert min(widths) == (24 if seen[0] == 26 else 8 if seen[0] == 6 else 16)


@pytest.mark.slow
def test_a_lookahead_that_sees_everything_changes_nothing():
    expected_BT, _ = sample(PROMPTS[:2], temperature=1.0)
    tokens_BT, _ = sample(PROMPTS[:2], temperature=1.0, lookahead=4)
    np.testing.assert_array_equal(tokens_BT, expected_BT)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lookahead": -1}, "lookahead=-1 must not be negative"),
        ({"lookahead": 2**31 - 1}, "lookahead=2147483647 must be at most 16777216."),
        ({"lookahead": 4, "append": True}, "append is lookahead=0"),
        ({"lookahead": 0, "append": True}, "append is lookahead=0"),
    ],
)
def test_impossible_windows_are_refused(settings, sentence):
    with pytest.raises(UserError) as error:
        sample([[1]], **settings)
    assert sentence in str(error.value)
