"""The picture of a canvas on its way to text: on a terminal, and as lines in a log."""

import io
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from support.recital import BYTES, SENTENCE, letters, recite

from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.samplers.canvas import make_canvas
from llada_jax.samplers.denoise import denoise
from llada_jax.samplers.show import (
    AGE_STYLES,
    PROMPT_STYLE,
    CanvasText,
    LiveShow,
    LogShow,
    make_show,
    shown_gaps,
    shown_generations,
)
from llada_jax.samplers.text import infill_text


def utf8_stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def written(stream) -> str:
    return stream.buffer.getvalue().decode()


def states_of(prompts, *, gen_length, **settings):
    canvas = make_canvas(
        [BYTES.encode(p) for p in prompts],
        gen_length=gen_length,
        mask_id=BYTES.mask_id,
        pad_id=BYTES.pad_id,
    )
    return denoise(
        jax.tree_util.Partial(recite, letters(SENTENCE)),
        canvas.tokens_BT,
        jax.random.key(0),
        mask_id=BYTES.mask_id,
        is_fixed_BT=canvas.is_fixed_BT,
        segment_ids_BT=canvas.segment_ids_BT,
        positions_BT=canvas.positions_BT,
        gen_length=gen_length,
        remasking="random",
        **settings,
    )


def shown(prompts, *, gen_length):
    return shown_generations(prompts, gen_length=gen_length, mask_id=BYTES.mask_id)


def test_a_log_of_many_samples_says_in_a_line_which_one_it_shows():
    stream = utf8_stream()
    prompts = ["i\nt", "IT IS"]
    show = LogShow(BYTES, shown(prompts, gen_length=8), stream=stream)
    with show:
        for state in states_of(prompts, gen_length=8, block_length=8, steps=2):
            show.on_step(range(2), state)
    lines = written(stream).splitlines()
    assert [line[:23] for line in lines] == ["sample 1/2, step 1/2  5", "sample 1/2, step 2/2 10"]
    assert "| i t" in lines[0]


def test_the_animation_highlights_what_the_step_revealed_and_greys_the_masks():
    stream = utf8_stream()
    console = Console(
        file=stream, force_terminal=True, width=80, height=24, color_system="truecolor"
    )
    prompts = ["it is ", "IT IS "]
    rows = shown(prompts, gen_length=16)
    with LiveShow(BYTES, rows, console=console, transient=False) as show:
        show.last_frame = -1.0
        for state in states_of(prompts, gen_length=16, block_length=8, steps=8):
            show.on_step(range(2), state)
            is_new_T = np.asarray(state.is_new_BT)[0, -16:]
            np.testing.assert_array_equal(
                show.ages[0] == 0, is_new_T | (np.asarray(state.canvas_BT)[0, -16:] == 256)
            )
    drawn = written(stream)
    assert "step 1/8" in drawn
    assert "block 2/2" in drawn
    assert "100% revealed" in drawn
    assert "░" in drawn
    last = drawn[drawn.rindex("step 8/8") :]
    assert "░" not in last
    assert "sample 1/2" in last
    assert "48;5;220m" in last, "the tokens of the last step keep their highlight"


def test_rows_that_do_not_fit_the_screen_are_left_out():
    console = Console(file=utf8_stream(), force_terminal=True, width=40, height=10)
    prompts = ["it is "] * 6
    show = LiveShow(BYTES, shown(prompts, gen_length=8), console=console, transient=True)
    pictured = []
    show.live = types.SimpleNamespace(update=lambda picture, refresh: pictured.append(picture))
    for state in states_of(prompts, gen_length=8, block_length=8, steps=1):
        show.on_step(range(6), state)
    assert len(pictured[0].renderables) == 1 + 2  # status, and two panels of three lines


def test_the_last_batch_may_have_fewer_rows():
    prompts = ["it is ", "IT IS ", "it"]
    console = Console(file=utf8_stream(), force_terminal=True, width=40, height=24)
    show = LiveShow(BYTES, shown(prompts, gen_length=8), console=console, transient=True)
    show.live = types.SimpleNamespace(update=lambda picture, refresh: None)
    for rows in (range(2), range(2, 3)):
        batch = [prompts[row] for row in rows]
        for state in states_of(batch, gen_length=8, block_length=8, steps=2):
            show.on_step(rows, state)
        assert len(show.ages) == len(batch)


def test_the_show_suits_the_stream(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rows = shown([""], gen_length=4)
    show = make_show(BYTES, rows, stream=utf8_stream(), transient=True)
    assert isinstance(show, LogShow)
    monkeypatch.setenv("FORCE_COLOR", "1")  # how CI systems ask for a terminal's output
    monkeypatch.setenv("TERM", "xterm-256color")
    show = make_show(BYTES, rows, stream=utf8_stream(), transient=True)
    assert isinstance(show, LiveShow)


GAPS = ["it [MASK:2] a [MASK:5] universally", "it [MASK:2]"]


def test_a_log_of_gaps_counts_them_alone_and_shows_what_is_given():
    stream = utf8_stream()
    show = LogShow(BYTES, shown_gaps(BYTES, GAPS), stream=stream)
    infill_text(recite, letters(SENTENCE), BYTES, GAPS, on_step=show.on_step)
    lines = written(stream).splitlines()
    # Nine tokens are wanted, of which the first step reveals one of each text.
    assert [line.partition(" | ")[0] for line in lines] == [
        "sample 1/2, step 1/7  22%",
        "sample 1/2, step 2/7  44%",
        "sample 1/2, step 3/7  56%",
        "sample 1/2, step 4/7  67%",
        "sample 1/2, step 5/7  78%",
        "sample 1/2, step 6/7  89%",
        "sample 1/2, step 7/7 100%",
    ]
    texts = [line.partition(" | ")[2] for line in lines]
    assert [text.count("░") for text in texts] == [6, 5, 4, 3, 2, 1, 0]
    assert texts[-1] == "it is a truth universally"
    assert all(text.startswith("it ") and text.endswith(" universally") for text in texts)


def test_given_tokens_are_drawn_like_a_prompt():
    console = Console(file=utf8_stream(), force_terminal=True, width=80, height=24)
    show = LiveShow(BYTES, shown_gaps(BYTES, GAPS), console=console, transient=True)
    pictured = []
    show.live = types.SimpleNamespace(update=lambda picture, refresh: pictured.append(picture))
    infill_text(recite, letters(SENTENCE), BYTES, GAPS, on_step=show.on_step)

    def styled(panel, style):
        text = panel.renderable
        return [text.plain[s.start : s.end] for s in text.spans if s.style == style]

    _, first, second = pictured[-1].renderables
    assert first.renderable.plain == "it is a truth universally"
    assert styled(first, PROMPT_STYLE) == ["it ", " a ", " universally"]
    assert styled(first, AGE_STYLES[0]) == ["h"], "the last step reveals the last token"
    assert second.renderable.plain == "it is"
    assert styled(second, PROMPT_STYLE) == ["it "]


def test_a_character_is_as_young_as_the_last_of_its_bytes():
    console = Console(file=utf8_stream(), force_terminal=True, width=80, height=24)
    show = LiveShow(BYTES, shown([""], gen_length=2), console=console, transient=True)
    row = types.SimpleNamespace(tokens_T=np.array([*"é".encode()]), is_given_T=np.zeros(2, bool))
    text = show.row_text("", row, np.array([9, 0]))
    assert text.plain == "é"
    assert [span.style for span in text.spans] == [AGE_STYLES[0]]


@pytest.fixture(scope="module")
def sentencepiece():
    text = (
        "it is a truth universally acknowledged that a single man in possession of a good fortune "
        "must be in want\n"
    )
    return train_sentencepiece([text * 20], vocab_size=297, model_type="unigram")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_revealed_pieces_join_to_the_decoded_text(kind, request):
    tokenizer = BYTES if kind == "bytes" else request.getfixturevalue("sentencepiece")
    text = "a truth in Zürich ☃ 😀 and 2\n in want"
    ids = tokenizer.encode(text)
    canvas_text = CanvasText(tokenizer, utf8_stream(), mask_width=3)
    cells = canvas_text.cells(ids, [False] * len(ids))
    assert "".join(cell.text for cell in cells) == text
    assert [column for cell in cells for column in cell.columns] == list(range(len(ids)))
    (cell,) = canvas_text.cells(ids, [True] * len(ids))
    assert (cell.text, cell.kind) == (text, "given")


def test_bytes_of_a_gap_do_not_join_those_that_are_given():
    tokens = [*"é".encode(), 0xC3, BYTES.mask_id]
    cells = CanvasText(BYTES, utf8_stream(), mask_width=1).cells(tokens, [True, True, False, False])
    assert [(cell.text, cell.kind) for cell in cells] == [
        ("é", "given"),
        ("\ufffd", "token"),
        ("░", "mask"),
    ]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_half_revealed_character_shows_as_a_placeholder(kind, request):
    tokenizer = BYTES if kind == "bytes" else request.getfixturevalue("sentencepiece")
    ids = tokenizer.encode("a☃a")
    snowman = ids.index(tokenizer.encode("☃")[-1]) - 1  # its second byte
    ids[snowman] = tokenizer.mask_id
    canvas_text = CanvasText(tokenizer, utf8_stream(), mask_width=3)
    cells = canvas_text.cells(ids, [False] * len(ids))
    assert [cell.text for cell in cells] == ["a", "\ufffd", canvas_text.mask, "\ufffd", "a"]
    assert [cell.kind for cell in cells] == ["token", "token", "mask", "token", "token"]


@pytest.mark.parametrize(
    ("encoding", "end", "mask"), [("ascii", "#", "_"), ("utf-8", "∎", "░"), ("UTF-8", "∎", "░")]
)
def test_eos_is_marked_and_a_stream_without_unicode_gets_ascii(encoding, end, mask):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    tokens = [97, BYTES.eos_id, BYTES.eos_id, BYTES.mask_id, BYTES.eos_id]
    cells = CanvasText(BYTES, stream, mask_width=3).cells(tokens, [False] * 5)
    assert [cell.text for cell in cells] == ["a", end, mask, end]
    assert [cell.kind for cell in cells] == ["token", "end", "mask", "end"]
