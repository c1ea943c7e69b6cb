"""docs/record_sample.py: a terminal animation becomes an animated picture."""

import importlib.util
import sys
from xml.dom import minidom

from support.paths import ROOT

SCRIPT = ROOT / "docs" / "record_sample.py"
SVG = SCRIPT.with_name("denoising.svg")

# What `sample --show` draws: a status line above a panel, here with three states of one word.
PROGRAM = """
import sys
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
print("llada-jax: a line that is not part of the picture", file=sys.stderr)
states = [("###", "grey35"), ("a<b", "bold black on gold1"), ("a<b", "")]
with Live(console=Console(file=sys.stderr), auto_refresh=False) as live:
    for step, (word, style) in enumerate(states):
        panel = Panel(Text(word, style=style), border_style="grey35")
        live.update(Group(Text(f"step {step}/2"), panel), refresh=True)
"""


def load_script():
    spec = importlib.util.spec_from_file_location("record_sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frames_of_a_terminal_become_an_animation_that_ends_with_the_last_one():
    script = load_script()
    frames = script.frames_of(script.record([sys.executable, "-c", PROGRAM]))
    assert [frame[0].plain.split()[1] for frame in frames] == ["0/2", "1/2", "2/2"]
    assert ["###" in frames[0][2].plain, "a<b" in frames[1][2].plain] == [True, True]

    picture = minidom.parseString(script.svg(frames, "llada-jax sample --show"))
    groups = {group.getAttribute("id"): group for group in picture.getElementsByTagName("g")}
    # Without animation only what the last frame shows is visible.
    visible = [group for group in groups.values() if not group.hasAttribute("visibility")]
    words = {
        text.firstChild.data for group in visible for text in group.getElementsByTagName("text")
    }
    assert {"step 2/2", "a<b"} <= words
    assert not words & {"###", "step 0/2", "step 1/2"}
    # The border does not change, so it is written once, for all frames.
    (border,) = [text for text in picture.getElementsByTagName("text") if "╭" in text.toxml()]
    assert border.parentNode.getAttribute("id") == "f0_3"
    # The highlighted word is drawn on a rectangle in the second frame only.
    assert [len(group.getElementsByTagName("rect")) for group in groups.values()].count(1) == 1
    assert groups["f1_2"].getElementsByTagName("rect")


def test_the_committed_picture_is_an_animation_of_many_frames():
    picture = minidom.parse(str(SVG))
    style = picture.getElementsByTagName("style")[0].firstChild.data
    assert style.count("@keyframes") > 40
    assert any("100% revealed" in text.toxml() for text in picture.getElementsByTagName("text"))
