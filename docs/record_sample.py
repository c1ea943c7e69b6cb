"""Records what `llada-jax sample --show` draws on a terminal, as an animated SVG.

    make demo
    .venv/bin/python docs/record_sample.py --checkpoint runs/tiny/run --output docs/denoising.svg

The command runs in a pseudo-terminal, so the picture shows what a user sees: the script reads the
bytes that the terminal receives, cuts them into frames, and writes every frame as text in an SVG
that needs neither scripts nor fonts of its own. The seed fixes the text, so the same checkpoint
gives the same picture. A viewer that does not animate SVGs shows the last frame.
"""

import argparse
import errno
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from html import escape
from pathlib import Path
from textwrap import wrap

from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 80, 24
CELL_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN = 8.4, 17, 14, 14
BACKGROUND, FOREGROUND = "#1b1d23", "#d6d6d6"
SECONDS_PER_FRAME, SECONDS_AT_THE_END = 0.16, 4.0

# Only for turning styled text into runs of one style.
CONSOLE = Console(width=COLUMNS)

# rich's Live takes the previous picture away before it draws the next one: it clears the line of
# the cursor, then goes up and clears, line by line. Between two of these lies one frame.
ERASE = re.compile(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*")
# Control sequences that neither draw nor colour, such as "hide the cursor".
CONTROL = re.compile(r"\x1b\[\?\d+[hl]|\x1b\[\d*[A-GJKST]")


def record(command: list[str]) -> str:
    """Runs a command whose stderr is a terminal of COLUMNS x ROWS, and returns what it wrote there.

    stdout is not the terminal: there, `sample` would take the picture away at the end and print
    the text instead.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONUTF8": "1"}
    env |= {"COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs, env=env
    )
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65_536)
        except OSError as error:
            # Linux reports the end of a pseudo-terminal as an input/output error.
            if error.errno != errno.EIO:
                raise
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    written = b"".join(chunks).decode()
    if process.wait():
        sys.exit(f"{shlex.join(command)} ended with status {process.returncode}:\n{written}")
    return written


def frames_of(written: str) -> list[list[Text]]:
    """Returns the pictures as lists of styled lines, without repetitions.

    A picture begins with the line "step N/M"; what else the command writes to stderr is left out.
    """
    frames = []
    for part in ERASE.split(written):
        lines = CONTROL.sub("", part).replace("\r\n", "\n").split("\n")
        text = [line for line in AnsiDecoder().decode("\n".join(lines)) if line.plain.strip()]
        starts = [i for i, line in enumerate(text) if line.plain.startswith("step ")]
        ends = [i for i, line in enumerate(text) if line.plain.startswith("╰")]
        if not starts or not ends:
            continue
        frame = text[starts[-1] : ends[-1] + 1]
        if not frames or [line.markup for line in frame] != [line.markup for line in frames[-1]]:
            frames.append(frame)
    return frames


def color_hex(color: Color | None, default: str) -> str:
    return default if color is None or color.is_default else color.get_truecolor(MONOKAI).hex


def draw_line(line: Text, y: float) -> list[str]:
    """Returns the SVG elements of one line whose baseline lies at `y`.

    Every run of one style has its own x and length, in cells: fonts differ from viewer to viewer
    in the width of a letter and of a block, and the columns must stay below each other.
    """
    runs: list[tuple[str, Style | None]] = []
    for segment in line.render(CONSOLE):
        if runs and runs[-1][1] == segment.style:
            runs[-1] = (runs[-1][0] + segment.text, segment.style)
        else:
            runs.append((segment.text, segment.style))
    elements, column = [], 0
    for text, style in runs:
        start, column = column, column + cell_len(text)
        if style and style.bgcolor and not style.bgcolor.is_default:
            x, width = MARGIN + start * CELL_WIDTH, cell_len(text) * CELL_WIDTH
            elements.append(
                f'<rect x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="{LINE_HEIGHT}" '
                f'fill="{color_hex(style.bgcolor, BACKGROUND)}"/>'
            )
        if not text.strip():
            continue
        # Without the spaces at its ends, because viewers disagree about whether textLength counts
        # them.
        x = MARGIN + (start + len(text) - len(text.lstrip())) * CELL_WIDTH
        length = cell_len(text.strip()) * CELL_WIDTH
        weight = ' font-weight="bold"' if style and style.bold else ""
        elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" textLength="{length:.1f}" '
            f'fill="{color_hex(style.color if style else None, FOREGROUND)}"{weight}>'
            f"{escape(text.strip())}</text>"
        )
    return elements


def intervals_of(frames: list[list[Text]], top: float) -> dict[tuple[int, int], list[str]]:
    """Returns {(first frame, frame after the last): elements that are visible in between}.

    Most of a frame is as it was in the frame before, so an element is written once for all the
    consecutive frames that hold it. `top` is the baseline of the first line.
    """
    since: dict[str, int] = {}
    intervals: dict[tuple[int, int], list[str]] = {}
    for number, frame in enumerate([*frames, []]):
        elements = [
            element
            for i, line in enumerate(frame)
            for element in draw_line(line, top + i * LINE_HEIGHT)
        ]
        for element in since.keys() - set(elements):
            intervals.setdefault((since.pop(element), number), []).append(element)
        for element in elements:
            since.setdefault(element, number)
    # Sorted, so that the same recording gives the same file; a rectangle comes before its text.
    return {interval: sorted(intervals[interval]) for interval in sorted(intervals)}


def svg(frames: list[list[Text]], shown: str) -> str:
    """Returns the SVG: the command, and below it the frames, each shown for SECONDS_PER_FRAME.

    The last frame stays for SECONDS_AT_THE_END, then the animation begins again.
    """
    seconds = (len(frames) - 1) * SECONDS_PER_FRAME + SECONDS_AT_THE_END
    command = wrap(shown, COLUMNS - 4, break_on_hyphens=False)
    top = MARGIN + (len(command) + 1.8) * LINE_HEIGHT
    height = top + MARGIN + max(map(len, frames)) * LINE_HEIGHT - LINE_HEIGHT / 2
    width = 2 * MARGIN + COLUMNS * CELL_WIDTH
    styles, groups = [], []
    for (start, stop), elements in intervals_of(frames, top).items():
        name, is_shown_at_the_end = f"f{start}_{stop}", stop == len(frames)
        hidden = "" if is_shown_at_the_end else ' visibility="hidden"'
        if (start, stop) != (0, len(frames)):
            moments = {0.0: "hidden", 100 * start * SECONDS_PER_FRAME / seconds: "visible"}
            if not is_shown_at_the_end:
                moments[100 * stop * SECONDS_PER_FRAME / seconds] = "hidden"
            steps = "".join(f"{at:.2f}%{{visibility:{what}}}" for at, what in moments.items())
            # step-end: nothing changes between two moments
            styles.append(f"@keyframes {name}{{{steps}}}")
            styles.append(f"#{name}{{animation:{name} {seconds:.2f}s step-end infinite}}")
        groups += [f'<g id="{name}"{hidden}>', *elements, "</g>"]
    styles.append("text{white-space:pre}")
    styles.append("@media (prefers-reduced-motion:reduce){g{animation:none !important}}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'role="img" xml:space="preserve" font-size="{FONT_SIZE}" '
            'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace">',
            "<title>llada-jax sample --show: masks turn into text</title>",
            "<desc>Recorded by docs/record_sample.py</desc>",
            "<style>",
            *styles,
            "</style>",
            f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
            *(
                f'<text x="{MARGIN}" y="{MARGIN + (i + 0.8) * LINE_HEIGHT:.1f}" fill="#8b95a7">'
                f"{'    ' if i else '$ '}{escape(words)}{end}</text>"
                for i, (words, end) in enumerate(
                    zip(command, [" \\"] * (len(command) - 1) + [""], strict=True)
                )
            ),
            *groups,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="runs/tiny/run", metavar="CKPT")
    parser.add_argument("--output", type=Path, default=Path("docs/denoising.svg"), metavar="FILE")
    parser.add_argument("--prompt", default="Elizabeth was")
    parser.add_argument("--gen-length", type=int, default=48, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.9, metavar="X")
    parser.add_argument("--seed", type=int, default=4, metavar="N")
    args = parser.parse_args()
    words = ["sample", "--checkpoint", args.checkpoint, "--prompt", args.prompt]
    words += ["--gen-length", str(args.gen_length), "--temperature", str(args.temperature)]
    words += ["--seed", str(args.seed), "--show"]
    frames = frames_of(record([sys.executable, "-m", "llada_jax", *words]))
    if len(frames) < 2:
        sys.exit("The command drew no picture; does `llada-jax sample --show` animate here?")
    args.output.write_text(svg(frames, shlex.join(["llada-jax", *words])), encoding="utf-8")
    size = args.output.stat().st_size
    print(f"{args.output}: {len(frames)} frames, {size / 1e3:.0f} kB; the last one reads")
    print("\n".join(line.plain for line in frames[-1]))


if __name__ == "__main__":
    main()
