"""The page that replays the denoising: what it records, and what a real browser shows of it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.chromium import Page
from support.recital import BYTES
from support.toy_networks import MASK, PAD, toy_logits, toy_logits_of_row, toy_params, windowed

from llada_jax.samplers.replay import Recording
from llada_jax.samplers.show import shown_gaps, shown_generations
from llada_jax.samplers.text import generate_tokens, infill_text

REQUEST = {"mask_id": MASK, "pad_id": PAD, "gen_length": 8}
OF_BYTES = {"mask_id": BYTES.mask_id, "pad_id": BYTES.pad_id, "eos_id": BYTES.end_ids}


def confidences_of(**settings):
    """Returns the states of a request with their confidences, on the host."""
    states = []

    def on_step(rows, state):
        states.append(jax.device_get((state.canvas_BT, state.is_new_BT, state.confidence_BT)))

    generate_tokens(
        toy_logits,
        toy_params(),
        [[1], [2, 3]],
        on_step=on_step,
        with_confidence=True,
        **REQUEST,
        **settings,
    )
    return states


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "remasking": "random", "steps": 4},
        {"block_length": 4, "commit": "threshold=0.3"},
    ],
    ids=str,
)
def test_a_confidence_is_the_probability_that_the_network_gives_the_revealed_token(settings):
    """Against numpy in float64, from the canvas before each step."""
    states = confidences_of(**settings)
    width = states[0][0].shape[1]
    prompt_width = width - 8
    segment_ids_BT = np.ones((2, width), np.int32)
    positions_BT = np.zeros((2, width), np.int32)
    for row, length in enumerate((1, 2)):
        first = prompt_width - length
        segment_ids_BT[row, :first] = 0
        positions_BT[row, first:] = np.arange(width - first)
    before_BT = np.where(np.arange(width) < prompt_width, states[0][0], MASK)
    num_seen = 0
    for canvas_BT, is_new_BT, confidence_BT in states:
        logits_BTV = toy_logits_of_row(
            toy_params(), jnp.asarray(before_BT), segment_ids_BT, positions_BT
        )
        logits_BTV = np.asarray(logits_BTV, np.float64)
        p_BTV = np.exp(logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True)))
        expected_BT = np.take_along_axis(p_BTV, canvas_BT[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(confidence_BT[is_new_BT], expected_BT[is_new_BT], rtol=1e-4)
        num_seen += is_new_BT.sum()
        before_BT = canvas_BT
    assert num_seen == 16


def test_what_fills_a_row_behind_its_end_has_no_confidence():
    @windowed
    def ends(params, tokens_BT, segment_ids_BT, positions_BT):
        wanted_S = jnp.array([3, 14, 5, 6, 7, 8, 9, 10])
        return 5.0 * jax.nn.one_hot(wanted_S[positions_BT], 16)

    heard = []
    generate_tokens(
        ends,
        {},
        [[]],
        eos_id=14,
        on_step=lambda _, s: heard.append(s),
        with_confidence=True,
        **REQUEST,
    )
    confidence_T = np.asarray(heard[-1].confidence_BT)[0, -8:]
    assert np.isnan(confidence_T).tolist() == [False, False, *[True] * 6]


def test_nothing_is_computed_where_no_confidence_is_asked_for():
    heard = []
    generate_tokens(
        toy_logits, toy_params(), [[1]], on_step=lambda _, s: heard.append(s), **REQUEST
    )
    assert {state.confidence_BT for state in heard} == {None}


# ---- the page

TEXTS = ["é <b>&", "</script>!."]


@windowed
def two_texts(params, tokens_BT, segment_ids_BT, positions_BT):
    """Each row recites a text of its own, with a certainty that falls with the position."""
    texts_BS = jnp.asarray(params)
    row_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    wanted_BT = texts_BS[row_B1, positions_BT % texts_BS.shape[1]]
    return (9.0 - 0.5 * positions_BT)[..., None] * jax.nn.one_hot(wanted_BT, BYTES.vocab_size)


def recorded(**settings):
    """A recording of two samples of 12 tokens, each with an end."""
    rows = [[*text.encode(), *[BYTES.eos_id] * 12][:12] for text in TEXTS]
    shown = shown_generations(["", ""], gen_length=12, mask_id=BYTES.mask_id)
    recording = Recording(BYTES, shown)
    generate_tokens(
        two_texts,
        np.array(rows),
        [[], []],
        gen_length=12,
        on_step=recording.on_step,
        with_confidence=True,
        **OF_BYTES,
        **settings,
    )
    recording._samples[0]["prompt"] = "<i>given</i> "
    return recording


def recorded_gaps(**settings):
    """A recording of two texts of different lengths, whose gaps are filled."""
    texts = ["é [MASK:2]> &", "[MASK]/sc[MASK:3]"]
    rows = [[*text.encode(), *[BYTES.eos_id] * 12][:12] for text in ("é <b> &", "</script>")]
    recording = Recording(BYTES, shown_gaps(BYTES, texts))
    infill_text(
        two_texts,
        np.array(rows),
        BYTES,
        texts,
        on_step=recording.on_step,
        with_confidence=True,
        **settings,
    )
    return recording


def data_of(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    # a browser knows no NaN
    return json.loads(data, parse_constant=pytest.fail)


def replayed(sample) -> str:
    """Returns the text of a sample after its last frame, as the page puts it together."""
    cells = {column: text for column, _, text, _ in sample["start"]}
    for frame in sample["frames"]:
        for column in frame["removed"]:
            del cells[column]
        cells |= {column: text for column, _, text, _ in frame["cells"]}
    return "".join(cells[column] for column in sorted(cells))


@pytest.mark.parametrize(
    "settings", [{}, {"block_length": 4}, {"revise": "remdm-cap=0.5"}], ids=str
)
def test_the_frames_of_a_page_end_in_the_texts(settings):
    data = data_of(recorded(**settings).page("runs/tiny"))
    assert [replayed(sample).rstrip("∎") for sample in data["samples"]] == TEXTS
    for sample in data["samples"]:
        shown = [column for frame in sample["frames"] for column, *_ in frame["revealed"]]
        assert set(shown) == set(range(12))


def test_what_an_end_replaces_is_recorded_without_a_confidence():
    text = [*b"a", BYTES.eos_id, *b"bcdefg"]
    recording = Recording(BYTES, shown_generations([""], gen_length=8, mask_id=BYTES.mask_id))
    generate_tokens(
        two_texts,
        np.array([text]),
        [[]],
        gen_length=8,
        on_step=recording.on_step,
        with_confidence=True,
        **OF_BYTES,
    )
    (sample,) = data_of(recording.page("runs/tiny"))["samples"]
    revealed = [cell for frame in sample["frames"] for cell in frame["revealed"]]
    assert [token for _, token, _ in revealed[:7]] == text[:7]
    # the last step fills the row
    assert revealed[7:] == [[column, BYTES.eos_id, None] for column in range(2, 8)]


@pytest.mark.parametrize("settings", [{}, {"steps": 1}, {"revise": "remdm-cap=0.5"}], ids=str)
def test_the_frames_of_gaps_reveal_them_alone(settings):
    data = data_of(recorded_gaps(**settings).page("runs/tiny"))
    first, second = data["samples"]
    assert first["prompt"] == second["prompt"] == ""
    assert first["start"] == [
        [0, 3, "é ", "given"],
        [3, 1, "░", "mask"],
        [4, 1, "░", "mask"],
        [5, 3, "> &", "given"],
    ]
    assert [cell[3] for cell in second["start"]] == ["mask", "given", "mask", "mask", "mask"]
    assert [replayed(sample) for sample in data["samples"]] == ["é <b> &", "</scrip"]
    for sample, gaps in ((first, {3, 4}), (second, {0, 4, 5, 6})):
        shown = [column for frame in sample["frames"] for column, *_ in frame["revealed"]]
        assert set(shown) == gaps


def test_no_text_of_a_page_can_become_markup():
    page = recorded().page("<script>alert(1)</script>")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>" not in page
    assert data_of(page)["title"] == "<script>alert(1)</script>"
    assert not re.search(
        r"https?://|src=|href=", page.split("<script")[0] + page.split("</script>")[1]
    )


@pytest.mark.slow
def test_a_browser_replays_a_sample_step_by_step(tmp_path):
    """Clicks through the page in a real Chromium."""
    file = tmp_path / "sample.html"
    file.write_text(recorded().page("<b>runs/tiny</b>"), encoding="utf-8")

    def text(number):
        return page.value(f"document.querySelector('#text-{number}').textContent")

    def step():
        return page.value("document.querySelector('#step').textContent")

    with Page(file, profile=tmp_path / "profile") as page:
        assert page.value("document.querySelector('h1').textContent") == "<b>runs/tiny</b>"
        assert page.value("document.querySelectorAll('b, i').length") == 0
        assert step() == "0/12"
        assert text(0) == "<i>given</i> " + "░" * 12
        # forwards: the surest token, which is the first byte of a character
        page.click("#forward")
        assert step() == "1/12"
        assert text(0) == "<i>given</i> \ufffd" + "░" * 11
        page.press("ArrowRight")
        assert text(0) == "<i>given</i> é" + "░" * 10
        page.hover("#text-0 .cell")
        tip = page.value("document.querySelector('#tip').textContent")
        assert re.fullmatch(
            r"byte 195  step 1  confidence 0\.9\d\d\nbyte 169  step 2  confidence 0\.9\d\d", tip
        )
        assert page.value("document.querySelectorAll('.new').length") == 2
        # back
        page.click("#back")
        page.click("#back")
        page.click("#back")
        assert step() == "0/12"
        assert page.value("document.querySelector('#tip').hidden")
        # play to the end, where it stops by itself
        page.click("#play")
        assert page.value("document.querySelector('#play').textContent") == "⏸"
        page.wait_for("document.querySelector('#step').textContent === '12/12'")
        assert page.value("document.querySelector('#play').textContent") == "▶"
        assert text(0) == "<i>given</i> é <b>&∎"
        assert text(1) == "</script>!.∎"
        # colours: of a sure token, and of an unsure one
        colours = page.value(
            "[...document.querySelectorAll('#text-1 .cell.token')].map((c) => c.style.background)"
        )
        assert len(set(colours)) > 3
        page.value("document.querySelector('#colour').value = 'step'")
        page.value("document.querySelector('#colour').dispatchEvent(new Event('change'))")
        assert page.value("document.querySelector('#high').textContent") == "early"
        # play again from the beginning, and pause
        page.click("#play")
        page.click("#play")
        before = step()
        assert page.value("document.querySelector('#play').textContent") == "▶"
        assert step() == before
        assert complaints(page) == []


@pytest.mark.slow
def test_a_browser_replays_how_gaps_are_filled(tmp_path):
    file = tmp_path / "gaps.html"
    file.write_text(recorded_gaps().page("runs/tiny"), encoding="utf-8")

    def texts():
        return page.value("[...document.querySelectorAll('.text')].map((t) => t.textContent)")

    def tip(selector):
        page.hover(selector)
        return page.value("document.querySelector('#tip').textContent")

    def style(selector):
        return page.value(
            "(({color, fontWeight}) => [color, fontWeight])"
            f"(getComputedStyle(document.querySelector('{selector}')))"
        )

    with Page(file, profile=tmp_path / "profile") as page:
        assert texts() == ["é ░░> &", "░/sc░░░"]
        headings = "[...document.querySelectorAll('h2')].map((h) => h.textContent)"
        assert page.value(headings) == ["sample 1/2, 2 steps", "sample 2/2, 4 steps"]
        assert style("#text-0 .given") == style("#text-0 .prompt")
        assert style("#text-0 .given") != style("#text-0 .mask")
        assert tip("#text-0 .given") == "given"
        assert tip("#text-0 .mask") == "masked, place 4"
        page.click("#forward")
        assert texts() == ["é <░> &", "</sc░░░"]
        assert re.fullmatch(r'"<"  step 1  confidence 0\.\d{3}', tip("#text-0 .token"))
        page.click("#play")
        page.wait_for("document.querySelector('#step').textContent === '4/4'")
        assert texts() == ["é <b> &", "</scrip"]
        assert page.value("document.querySelectorAll('.given').length") == 3
        assert page.value("document.querySelectorAll('b').length") == 0
        page.click("#back")
        assert texts() == ["é <b> &", "</scri░"]
        assert complaints(page) == []


def complaints(page):
    """Returns what a page has asked for besides itself, and its errors."""
    unwanted = ("Network.requestWillBeSent", "Runtime.exceptionThrown", "Log.entryAdded")
    found = [message for message in page.messages if message["method"] in unwanted]
    assert found[0]["params"]["request"]["url"].endswith(".html")
    return found[1:]
