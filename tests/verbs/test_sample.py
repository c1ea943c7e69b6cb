"""The sample verb: what it prints where, what it refuses, and the picture of a canvas on its way to
text.
"""

import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import llada_jax.verbs.sample
from llada_jax import __main__
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.tokenizer_training import train_sentencepiece
from llada_jax.errors import UserError
from llada_jax.samplers.denoise import denoise, make_canvas
from llada_jax.samplers.show import NUM_SNAPSHOTS, CanvasText, LiveShow, LogShow, make_show

BYTES = load_tokenizer("bytes")
SENTENCE = "it is a truth universally acknowledged, "


def recite(params, tokens_BT, segment_ids_BT, positions_BT):
    """A network that knows one sentence by heart: the letter at a position depends on the position
    alone.
    """
    sentence_S = jnp.asarray(params)
    return 9.0 * jax.nn.one_hot(sentence_S[positions_BT % len(sentence_S)], BYTES.vocab_size)


def fake_pretrained(text=SENTENCE, objective="masked_diffusion"):
    return types.SimpleNamespace(
        tokenizer=BYTES,
        config={"data": {"sequence_length": 48}, "objective": {"name": objective}},
        params=np.array(
            [*text.encode(), BYTES.eos_id][: len(text.encode()) + text.endswith(".")], np.int32
        ),
        step=1200,
        logits_fn=recite,
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the verb on a model that recites; returns (exit status, stdout, stderr)."""

    def run_verb(*argv, pretrained=None, checkpoint="runs/fake"):
        loaded = []

        def load(path):
            loaded.append(path)
            return pretrained or fake_pretrained()

        monkeypatch.setattr(llada_jax.verbs.sample, "load", load)
        status = __main__.main(["sample", "--checkpoint", checkpoint, *argv])
        out, err = capsys.readouterr()
        assert loaded in ([], [checkpoint])
        return status, out, err

    return run_verb


def test_the_text_is_on_stdout_and_the_rest_on_stderr(run):
    status, out, err = run("--prompt", "it is ", "--gen-length", "16")
    assert (status, out) == (0, "it is a truth universa\n")
    assert err.startswith("llada-jax: 1 texts, 16 tokens in ")
    assert err.count("\n") == 1


def test_without_a_prompt_text_comes_from_nothing(run):
    assert run("--gen-length", "13")[1] == "it is a truth\n"


def test_several_prompts_and_samples_are_separated(run):
    _, out, _ = run(
        "--prompt", "it", "IT IS", "--num-samples", "2", "--gen-length", "4", "--temperature", "0.1"
    )
    assert out == "\n---\n".join(["it is ", "it is ", "IT IS a t", "IT IS a t"]) + "\n"


def test_json_is_one_object_and_nothing_else(run):
    status, out, _ = run(
        "--prompt",
        "it is ",
        "--gen-length",
        "8",
        "--block-length",
        "4",
        "--steps",
        "4",
        "--seed",
        "7",
        "--json",
        "--show",
    )
    assert status == 0
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "checkpoint": "runs/fake",
        "step": 1200,
        "settings": {
            "gen_length": 8,
            "block_length": 4,
            "steps": 4,
            "temperature": 0.0,
            "cfg_scale": 0.0,
            "remasking": "low_confidence",
            "seed": 7,
            "batch_size": 16,
            "stop_at_eos": True,
        },
        "samples": [
            {
                "prompt": "it is ",
                "completion": "a truth ",
                "tokens": list(b"a truth "),
                "num_steps": 4,
            }
        ],
    }


def test_a_text_ends_at_eos_unless_told_to_ignore_it(run):
    dot = fake_pretrained("the end.")
    _, out, _ = run("--gen-length", "16", "--block-length", "4", "--json", pretrained=dot)
    sample = json.loads(out)["samples"][0]
    assert (sample["completion"], sample["num_steps"]) == ("the end.", 12)
    _, out, _ = run(
        "--gen-length", "16", "--block-length", "4", "--json", "--ignore-eos", pretrained=dot
    )
    sample = json.loads(out)["samples"][0]
    assert (sample["completion"], sample["num_steps"]) == ("the end.the end", 16)
    assert sample["tokens"][8] == BYTES.eos_id


def test_prompts_come_from_a_file_or_stdin(run, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_bytes("it\r\n\nit is é\n".encode())
    _, out, _ = run(
        "--prompt-file", str(file), "--gen-length", "3"
    )  # the reciter counts the two bytes of é
    assert out == "it is\n---\nit is étru\n"
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"it is")))
    assert run("--prompt-file", "-", "--gen-length", "8")[1] == "it is a truth\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gen-length", "10", "--block-length", "4"], "block_length=4 must divide gen_length=10"),
        (["--steps", "65"], "steps=65 must not exceed gen_length=64"),
        (["--remasking", "low-confidense"], "Did you mean 'low_confidence'?"),
        (["--num-samples", "0"], "--num-samples 0 must be at least 1"),
        (["--temprature", "1"], "there is no '--temprature'. Did you mean '--temperature'?"),
        (["--gen-length", "many"], "invalid int value: 'many'"),
        (["--prompt", "a", "--prompt-file", "b"], "keep one"),
        (["--prompt-file", "/nowhere/prompts.txt"], "cannot be read: No such file"),
        (["--prompt", "caf\udce9"], "is not UTF-8"),
        (["--seed", "-1"], "seed=-1 must lie between"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
    ],
)
def test_mistakes_exit_2_with_one_line(run, argv, sentence):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\n\n", "holds no prompt"), (b"ok\ncaf\xe9\n", "not UTF-8 at byte 6")],
)
def test_unusable_prompt_files_exit_2(run, tmp_path, content, sentence):
    (tmp_path / "prompts.txt").write_bytes(content)
    status, _, err = run("--prompt-file", str(tmp_path / "prompts.txt"))
    assert status == 2
    assert sentence in err


def test_a_model_that_has_seen_no_mask_is_refused(run):
    status, _, err = run(pretrained=fake_pretrained(objective="autoregressive"))
    assert status == 2
    assert "has never seen a mask" in err


def test_surprises_are_announced_but_not_refused(run):
    status, out, err = run("--prompt", "it", "--gen-length", "48", "--num-samples", "2")
    assert status == 0
    assert "make 50 tokens, the model was trained on 48" in err
    assert "repeats the same text; try --temperature" in err
    assert len(out.split("\n---\n")) == 2


def test_the_help_fits_a_screen_and_ends_with_an_example(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = llada_jax.verbs.sample.make_parser().format_help().rstrip("\n").split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert lines[-1].startswith("  llada-jax sample --checkpoint")


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
        jax.tree_util.Partial(recite, fake_pretrained().params),
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


def test_a_log_shows_the_denoising_in_a_handful_of_lines(run):
    _, out, err = run("--prompt", "it ", "--gen-length", "32", "--show")
    lines = [line for line in err.split("\n") if "| " in line]
    assert len(lines) == NUM_SNAPSHOTS
    masks = [line.count("░") + line.count("_") for line in lines]
    assert masks == [28, 24, 20, 16, 12, 8, 4, 0]
    assert lines[0].startswith("step  4/32  12% | it is a")
    assert lines[-1] == "step 32/32 100% | " + out.strip("\n")


def test_a_log_of_many_samples_says_which_one_it_shows():
    stream = utf8_stream()
    prompts = ["it", "IT IS"]
    show = LogShow(BYTES, prompts, gen_length=8, stream=stream)
    with show:
        for state in states_of(prompts, gen_length=8, block_length=8, steps=2):
            show.on_step(range(2), state)
    assert [line[:23] for line in written(stream).split("\n")[:2]] == [
        "sample 1/2, step 1/2  5",
        "sample 1/2, step 2/2 10",
    ]


def test_the_animation_highlights_what_the_step_revealed_and_greys_the_masks():
    stream = utf8_stream()
    console = Console(
        file=stream, force_terminal=True, width=80, height=24, color_system="truecolor"
    )
    prompts = ["it is ", "IT IS "]
    with LiveShow(BYTES, prompts, gen_length=16, console=console, transient=False) as show:
        show.last_frame = -1.0
        for state in states_of(prompts, gen_length=16, block_length=8, steps=8):
            show.on_step(range(2), state)
            is_new_T = np.asarray(state.is_new_BT)[0, -16:]
            np.testing.assert_array_equal(
                show.age_BT[0] == 0, is_new_T | (np.asarray(state.canvas_BT)[0, -16:] == 256)
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
    show = LiveShow(BYTES, prompts, gen_length=8, console=console, transient=True)
    pictured = []
    show.live = types.SimpleNamespace(update=lambda picture, refresh: pictured.append(picture))
    for state in states_of(prompts, gen_length=8, block_length=8, steps=1):
        show.on_step(range(6), state)
    assert len(pictured[0].renderables) == 1 + 2  # status, and two panels of three lines


def test_the_show_suits_the_stream(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    show = make_show(BYTES, [""], gen_length=4, stream=utf8_stream(), transient=True)
    assert isinstance(show, LogShow)
    monkeypatch.setenv("FORCE_COLOR", "1")  # how CI systems ask for a terminal's output
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(
        make_show(BYTES, [""], gen_length=4, stream=utf8_stream(), transient=True), LiveShow
    )


@pytest.fixture(scope="module")
def sentencepiece():
    text = "it is a truth universally acknowledged that a single man in possession of a good fortune must be in want\n"
    return train_sentencepiece([text * 20], vocab_size=297, model_type="unigram")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_revealed_pieces_join_to_the_decoded_text(kind, request):
    tokenizer = BYTES if kind == "bytes" else request.getfixturevalue("sentencepiece")
    text = "a truth in Zürich ☃ 😀 and 2\n in want"
    ids = tokenizer.encode(text)
    cells = CanvasText(tokenizer, utf8_stream(), mask_width=3).cells(ids, [False] * len(ids))
    assert "".join(cell.text for cell in cells) == text
    assert [column for cell in cells for column in cell.columns] == list(range(len(ids)))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_half_revealed_character_shows_as_a_placeholder(kind, request):
    tokenizer = BYTES if kind == "bytes" else request.getfixturevalue("sentencepiece")
    ids = tokenizer.encode("a☃a")
    snowman = ids.index(tokenizer.encode("☃")[-1]) - 1  # its second byte
    is_masked = [i == snowman for i in range(len(ids))]
    canvas_text = CanvasText(tokenizer, utf8_stream(), mask_width=3)
    cells = canvas_text.cells(ids, is_masked)
    assert [cell.text for cell in cells] == ["a", "\ufffd", canvas_text.mask, "\ufffd", "a"]
    assert [cell.is_mask for cell in cells] == [False, False, True, False, False]


def test_eos_is_marked_and_a_stream_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    tokens = [97, BYTES.eos_id, BYTES.eos_id, BYTES.mask_id, BYTES.eos_id]
    cells = CanvasText(BYTES, stream, mask_width=3).cells(
        tokens, [False, False, False, True, False]
    )
    assert [cell.text for cell in cells] == ["a", "#", "_", "#"]
    assert [cell.is_end for cell in cells] == [False, True, False, True]


def test_reading_prompts_refuses_two_sources():
    with pytest.raises(UserError, match="keep one"):
        llada_jax.verbs.sample.read_prompts([""], "-")


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfIt is\nIt was\n")
    prompts = llada_jax.verbs.sample.read_prompts(None, str(tmp_path / "prompts.txt"))
    assert prompts == ["It is", "It was"]
