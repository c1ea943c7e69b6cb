"""The canvas while it is denoised: animated on a terminal, a handful of lines in a log."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.text import decode_after

NUM_SNAPSHOTS = 8  # lines written where there is no terminal
MAX_LINE = 160  # characters of text in such a line
# A small model is slowed down to what an eye can follow: 64 steps last 2.5 seconds.
MIN_FRAME_SECONDS = 0.04

MASK_STYLE = "grey35"
PROMPT_STYLE = "bold cyan"
END_STYLE = "grey50"
# By the number of steps since the token was revealed.
AGE_STYLES = ("bold grey7 on gold1", "bold gold1", "light_goldenrod1")


class Cell(NamedTuple):
    """Neighbouring columns that are drawn as one: text, masks (`is_mask`) or EOS (`is_end`)."""

    text: str
    columns: range
    is_mask: bool = False
    is_end: bool = False


class CanvasText:
    """Turns a half-denoised row into text, token by token.

    A token is decoded behind an ordinary one, because tokenizers drop the space in front of the
    first word. Tokens that hold only some bytes of a character are decoded together with their
    neighbours; while a byte is still masked, the others show as U+FFFD.

    Args:
        stream: where the text will go; one that cannot write Unicode gets ASCII in place of the
            blocks.
        mask_width: blocks that stand for one masked token, unless tokens are bytes.
    """

    def __init__(self, tokenizer: Any, stream: TextIO, *, mask_width: int) -> None:
        self.tokenizer = tokenizer
        self.anchor = tokenizer.encode("a")
        self.text_of: dict[int, str] = {}
        can_draw = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        block, self.end = ("░", "∎") if can_draw else ("_", "#")
        self.mask = block if tokenizer.kind == "bytes" else " " + block * mask_width

    def decode(self, tokens: Sequence[int]) -> str:
        return decode_after(self.tokenizer, self.anchor, tokens)

    def is_partial(self, token: int) -> bool:
        if token not in self.text_of:
            self.text_of[token] = self.decode([token])
        return "\ufffd" in self.text_of[token]

    def cells(self, tokens: Sequence[int], is_masked: Sequence[bool]) -> list[Cell]:
        """Returns the cells of one row, which cover every column once and in order. Several ends in
        a row are one cell.
        """
        cells, ends = [], self.tokenizer.end_ids
        column = 0
        while column < len(tokens):
            token = int(tokens[column])
            stop = column + 1
            if is_masked[column]:
                cells.append(Cell(self.mask, range(column, stop), is_mask=True))
            elif token in ends:
                while stop < len(tokens) and not is_masked[stop] and tokens[stop] in ends:
                    stop += 1
                cells.append(Cell(self.end, range(column, stop), is_end=True))
            elif self.is_partial(token):
                while (
                    stop < len(tokens)
                    and not is_masked[stop]
                    and self.is_partial(int(tokens[stop]))
                ):
                    stop += 1
                cells.append(
                    Cell(self.decode([int(t) for t in tokens[column:stop]]), range(column, stop))
                )
            else:
                cells.append(Cell(self.text_of[token], range(column, stop)))
            column = stop
        return cells


class _Frame(NamedTuple):
    """The generation of one batch after a step, on the host: arrays [rows, gen_length]."""

    tokens_BT: np.ndarray
    is_masked_BT: np.ndarray
    is_new_BT: np.ndarray

    @property
    def share_revealed(self) -> float:
        return 1 - self.is_masked_BT.mean()


def _frame(rows: range, state: DenoiseStep, *, mask_id: int, gen_length: int) -> _Frame:
    canvas_BT, is_new_BT = jax.device_get((state.canvas_BT, state.is_new_BT))
    tokens_BT = canvas_BT[: len(rows), -gen_length:]
    return _Frame(tokens_BT, tokens_BT == mask_id, is_new_BT[: len(rows), -gen_length:])


class LogShow:
    """Writes NUM_SNAPSHOTS lines per batch to a stream that is not a terminal, each with the first
    row of the batch.
    """

    def __init__(
        self, tokenizer: Any, prompts: Sequence[str], *, gen_length: int, stream: TextIO
    ) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.gen_length, self.stream = gen_length, stream
        self.canvas_text = CanvasText(tokenizer, stream, mask_width=1)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def on_step(self, rows: range, state: DenoiseStep) -> None:
        frame = _frame(rows, state, mask_id=self.tokenizer.mask_id, gen_length=self.gen_length)
        # By what is revealed and not by the step, because a row may need few of its steps.
        num_revealed = frame.tokens_BT.size - frame.is_masked_BT.sum()
        num_before = num_revealed - frame.is_new_BT.sum()
        before, now = (
            int(number) * NUM_SNAPSHOTS // frame.tokens_BT.size
            for number in (num_before, num_revealed)
        )
        if now == before:
            return
        cells = self.canvas_text.cells(frame.tokens_BT[0], frame.is_masked_BT[0])
        text = "".join([self.prompts[rows[0]], *(cell.text for cell in cells)]).replace("\n", " ")
        text = text if len(text) <= MAX_LINE else text[: MAX_LINE - 3] + "..."
        which = f"sample {rows[0] + 1}/{len(self.prompts)}, " if len(self.prompts) > 1 else ""
        width = len(str(state.num_steps))
        print(
            f"{which}step {state.step:>{width}}/{state.num_steps} {frame.share_revealed:4.0%} | "
            f"{text}",
            file=self.stream,
            flush=True,
        )


class LiveShow:
    """Animates the canvas on a terminal: grey masks, and every token bright in the step that
    reveals it.

    Args:
        transient: remove the picture at the end, because the texts are printed on the same terminal
            next.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        gen_length: int,
        console: Any,
        transient: bool,
    ) -> None:
        from rich.live import Live

        self.tokenizer, self.prompts = tokenizer, prompts
        self.gen_length, self.console = gen_length, console
        # A mask is about as wide as the word that it hides.
        self.canvas_text = CanvasText(tokenizer, console.file, mask_width=3)
        self.live = Live(
            console=console, auto_refresh=False, transient=transient, vertical_overflow="ellipsis"
        )
        self.rows: range | None = None
        self.age_BT: np.ndarray = np.zeros((0, 0), int)
        self.last_frame = 0.0

    def __enter__(self) -> Any:
        self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.__exit__(*exception)

    def on_step(self, rows: range, state: DenoiseStep) -> None:
        frame = _frame(rows, state, mask_id=self.tokenizer.mask_id, gen_length=self.gen_length)
        if rows != self.rows:
            self.rows, self.age_BT = rows, np.zeros(frame.tokens_BT.shape, int)
        self.age_BT = np.where(frame.is_new_BT | frame.is_masked_BT, 0, self.age_BT + 1)
        time.sleep(max(0.0, self.last_frame + MIN_FRAME_SECONDS - time.monotonic()))
        self.last_frame = time.monotonic()
        self.live.update(self.picture(rows, state, frame), refresh=True)

    def picture(self, rows: range, state: DenoiseStep, frame: _Frame) -> Any:
        """Returns a status line with a bar above one panel for each of the rows that fit the
        screen.
        """
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        header = Table.grid(padding=(0, 2))
        header.add_row(
            f"step {state.step:>{len(str(state.num_steps))}}/{state.num_steps}",
            f"block {state.block}/{state.num_blocks}",
            ProgressBar(
                total=1.0, completed=frame.share_revealed, width=30, complete_style="gold1"
            ),
            f"{frame.share_revealed:4.0%} revealed",
        )
        texts = [
            self.row_text(rows[i], frame.tokens_BT[i], frame.is_masked_BT[i], self.age_BT[i])
            for i in range(len(rows))
        ]
        panels: list[Any] = []
        lines_left = self.console.height - 2
        for row, text in zip(rows, texts):
            height = 2 + len(text.wrap(self.console, self.console.width - 4))
            if panels and height > lines_left:
                break
            lines_left -= height
            title = f"sample {row + 1}/{len(self.prompts)}" if len(self.prompts) > 1 else None
            panels.append(Panel(text, title=title, title_align="left", border_style=MASK_STYLE))
        return Group(header, *panels)

    def row_text(self, row: int, tokens: Any, is_masked: Any, age: Any) -> Any:
        """Returns the prompt and the generation of one row as styled text."""
        from rich.text import Text

        text = Text().append(self.prompts[row], style=PROMPT_STYLE)
        for cell in self.canvas_text.cells(tokens, is_masked):
            youngest = min(age[column] for column in cell.columns)
            if cell.is_mask:
                style = MASK_STYLE
            elif youngest < len(AGE_STYLES):
                style = AGE_STYLES[youngest]
            else:
                style = END_STYLE if cell.is_end else ""
            text.append(cell.text, style=style)
        return text


def make_show(
    tokenizer: Any, prompts: Sequence[str], *, gen_length: int, stream: TextIO, transient: bool
) -> Any:
    """Returns the show that suits the stream: a context manager with the `on_step` that
    `generate_tokens` calls after each step.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveShow(
            tokenizer, prompts, gen_length=gen_length, console=console, transient=transient
        )
    return LogShow(tokenizer, prompts, gen_length=gen_length, stream=stream)
