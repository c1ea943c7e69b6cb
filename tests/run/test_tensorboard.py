"""What TensorBoard shows of a run: the order of its groups, texts as they are, and hparams."""

import html
import re

import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st
from support.required import library
from support.tensorboard import board_of

from llada_jax.run.metrics_file import MetricsWriter
from llada_jax.run.tensorboard import EventsFile, as_code, tags_of
from llada_jax.samplers.text import Completion


def test_what_is_learned_comes_first_and_the_machine_last():
    groups = ["speed", "final_0_a", "train", "heldout_0_a", "final", "heldout"]
    shown = sorted({tag for group in groups for tag in tags_of(group)})
    assert shown == [
        "1_train",
        "2_heldout",
        "2_heldout_0_a",
        "3_final",
        "3_final_0_a",
        "9_speed",
    ]


def test_the_curve_of_held_out_text_ends_with_the_last_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"train": {"loss": 3.0}})
    writer.write(10, {"heldout": {"nelbo": 2.0}})
    writer.write(20, {"train": {"loss": 2.0}})
    writer.write(20, {"final": {"nelbo": 1.5}})
    writer.close()
    board = board_of(tmp_path)
    curve = board.Scalars("2_heldout/nelbo")
    assert [(event.step, event.value) for event in curve] == [(10, 2.0), (20, 1.5)]
    assert [event.step for event in board.Scalars("3_final/nelbo")] == [20]


def test_the_curve_goes_on_when_the_clock_of_a_later_start_is_behind(tmp_path, monkeypatch):
    for began, resume_step, steps in ((2e9, None, (10, 20)), (1e9, 20, (30, 40))):
        monkeypatch.setattr("time.time", lambda began=began: began)
        writer = MetricsWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            writer.write(step, {"train": {"loss": 3.0}})
        writer.close()
    curve = board_of(tmp_path).Scalars("1_train/loss")
    assert [event.step for event in curve] == [10, 20, 30, 40]


AWKWARD = ["# no heading", "<b>bold</b> & <script>", "a*b*c", "1. one\n\n    two", "```", "", "|a|"]


def blocks_of(markdown: str) -> list[str]:
    """Returns the texts that a browser shows for the code in Markdown, by TensorBoard's own
    conversion.
    """
    page = library("tensorboard.plugin_util").markdown_to_safe_html(markdown)
    found = re.findall(r"<pre><code>(.*?)</code></pre>", page, flags=re.DOTALL)
    return [html.unescape(code) for code in found]


def shown(text: str) -> str:
    (code,) = blocks_of(f"prompt\n\n{as_code(text)}\n\nend") or [""]
    return code


@pytest.mark.parametrize("text", AWKWARD)
def test_a_sampled_text_is_shown_as_it_is(text):
    assert shown(text).rstrip("\n") == text.rstrip("\n")


def test_the_samples_of_a_run_are_shown_as_they_are(tmp_path):
    texts = [text for text in AWKWARD if text]
    samples = [Completion(prompt, text, [], 0) for prompt, text in zip(texts, texts[::-1])]
    writer = MetricsWriter(tmp_path)
    writer.samples(10, samples)
    writer.close()
    board = board_of(tmp_path)
    (tag,) = board.Tags()["tensors"]
    (markdown,) = board.Tensors(tag)[0].tensor_proto.string_val
    found = [block.rstrip("\n") for block in blocks_of(markdown.decode())]
    assert found == [text.rstrip("\n") for sample in samples for text in sample[:2]]


@given(st.text(alphabet="ab *_#`<>&[]()|-1.\n", max_size=40))
@example("&#1")
def test_any_sampled_text_is_shown_as_it_is(text):
    # blank lines at both ends of a block, and spaces at the end of a line, are not shown
    def visible(s):
        return "\n".join(line.rstrip() for line in s.split("\n")).strip("\n")

    ended = re.sub(r"(&#\d+)(?![\d;])", r"\1;", text)  # see as_code
    assert visible(shown(text)) == visible(ended)


def test_knobs_and_results_are_in_the_table_of_hparams(tmp_path):
    events = EventsFile(epath.Path(tmp_path), first_step=None)
    knobs = {"optimizer.b2": 0.98, "optimizer.name": "lion", "schedule.stages": ((1e9, 1.0, 1.0),)}
    events.hparams(knobs, {"bits_per_byte": 1.75})
    events.close()
    board = board_of(tmp_path)
    metadata = library("tensorboard.plugins.hparams.metadata")
    content = {
        tag: board.SummaryMetadata(tag).plugin_data.content
        for tag in board.PluginTagToContent("hparams")
    }
    started = metadata.parse_session_start_info_plugin_data(
        content[metadata.SESSION_START_INFO_TAG]
    )
    assert started.hparams["optimizer.b2"].number_value == 0.98
    assert started.hparams["optimizer.name"].string_value == "lion"
    assert started.hparams["schedule.stages"].string_value == "((1000000000.0, 1.0, 1.0),)"
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == ["hparam/bits_per_byte"]
    assert board.Scalars("hparam/bits_per_byte")[0].value == 1.75
