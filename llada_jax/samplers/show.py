"""The canvas while it is denoised: animated on a terminal, a handful of lines in a log."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.text import decode_after, parse_gaps

NUM_SNAPSHOTS = 8  # lines written where there is no terminal
MAX_LINE = 160  # characters of text in such a line
# A small model is slowed down to what an eye can follow: 64 steps last 2.5 seconds.
MIN_FRAME_SECONDS = 0.04

MASK_STYLE = "grey35"
PROMPT_STYLE = "bold cyan"
END_STYLE = "grey50"
# By the number of steps since the token was revealed.
AGE_STYLES = ("bold grey7 on gold1", "bold gold1", "light_goldenrod1")

# The kinds of cells.
MASK, GIVEN, TOKEN, END = "mask", "given", "token", "end"
# Some bytes of a character; drawn as a token.
_PARTIAL = "partial"


class Shown(NamedTuple):
    """What is drawn of a row: the text in front of it, the tokens that it starts with, and the
    columns of the canvas in which they stand.
    """

    prompt: str
    tokens: Sequence[int]  # the mask where a token is wanted
    is_given: Sequence[bool]
    columns: slice


def shown_generations(prompts: Sequence[str], *, gen_length: int, mask_id: int) -> list[Shown]:
    """Returns what is drawn where text is generated behind prompts."""
    masks, is_given = [mask_id] * gen_length, [False] * gen_length
    return [Shown(prompt, masks, is_given, slice(-gen_length, None)) for prompt in prompts]


def shown_gaps(tokenizer: Any, texts: Sequence[str]) -> list[Shown]:
    """Returns what is drawn where the gaps of texts are filled, see parse_gaps."""
    parsed = [parse_gaps(tokenizer, text) for text in texts]
    return [Shown("", tokens, is_given, slice(len(tokens))) for tokens, is_given in parsed]


class Cell(NamedTuple):
    """Neighbouring columns that are drawn as one."""

    text: str
    columns: range
    kind: str


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

    def cells(
        self, tokens: Sequence[int] | np.ndarray, is_given: Sequence[bool] | np.ndarray
    ) -> list[Cell]:
        """Returns the cells of one row, which cover every column once and in order. Given tokens in
        a row are one cell, and so are several ends.
        """
        ids = [int(token) for token in tokens]
        kinds = [self._kind(token, given) for token, given in zip(ids, is_given, strict=True)]
        cells: list[Cell] = []
        column = 0
        while column < len(kinds):
            kind, stop = kinds[column], column + 1
            while kind not in (MASK, TOKEN) and stop < len(kinds) and kinds[stop] == kind:
                stop += 1
            if kind in (MASK, END):
                text = self.mask if kind == MASK else self.end
            elif kind == TOKEN:
                text = self.text_of[ids[column]]
            elif kind == GIVEN and column == 0:
                text = self.tokenizer.decode(ids[:stop])
            else:
                text = self.decode(ids[column:stop])
            kind = TOKEN if kind == _PARTIAL else kind
            cells.append(Cell(text, range(column, stop), kind))
            column = stop
        return cells

    def _kind(self, token: int, is_given: bool) -> str:
        if is_given:
            return GIVEN
        if token == self.tokenizer.mask_id:
            return MASK
        if token in self.tokenizer.end_ids:
            return END
        return _PARTIAL if self.is_partial(token) else TOKEN


class _Row(NamedTuple):
    """The shown part of a row after a step, on the host: arrays [T]."""

    tokens_T: np.ndarray
    is_given_T: np.ndarray
    is_masked_T: np.ndarray
    is_new_T: np.ndarray


class _Frame(NamedTuple):
    """The rows of a batch after a step, and how many of their tokens are wanted and hidden."""

    rows: list[_Row]
    num_wanted: int
    num_hidden: int

    @property
    def share_revealed(self) -> float:
        return 1 - self.num_hidden / self.num_wanted


def _frame(numbers: range, state: DenoiseStep, shown: Sequence[Shown], mask_id: int) -> _Frame:
    arrays = jax.device_get((state.canvas_BT, state.is_new_BT))
    rows = []
    for place, number in enumerate(numbers):
        tokens_T, is_new_T = (array[place, shown[number].columns] for array in arrays)
        is_given_T = np.asarray(shown[number].is_given)
        rows.append(_Row(tokens_T, is_given_T, (tokens_T == mask_id) & ~is_given_T, is_new_T))
    return _Frame(
        rows,
        sum(int((~row.is_given_T).sum()) for row in rows),
        sum(int(row.is_masked_T.sum()) for row in rows),
    )


class LogShow:
    """Writes NUM_SNAPSHOTS lines per batch to a stream that is not a terminal, each with the first
    row of the batch.

    Args:
        shown: what is drawn of each row of the request.
    """

    def __init__(self, tokenizer: Any, shown: Sequence[Shown], *, stream: TextIO) -> None:
        self.tokenizer, self.shown, self.stream = tokenizer, shown, stream
        self.canvas_text = CanvasText(tokenizer, stream, mask_width=1)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def on_step(self, rows: range, state: DenoiseStep) -> None:
        frame = _frame(rows, state, self.shown, self.tokenizer.mask_id)
        # By what is revealed and not by the step, because a row may need few of its steps.
        num_revealed = frame.num_wanted - frame.num_hidden
        num_before = num_revealed - sum(int(row.is_new_T.sum()) for row in frame.rows)
        before, now = (
            number * NUM_SNAPSHOTS // frame.num_wanted for number in (num_before, num_revealed)
        )
        if now == before:
            return
        first = frame.rows[0]
        cells = self.canvas_text.cells(first.tokens_T, first.is_given_T)
        text = "".join([self.shown[rows[0]].prompt, *(cell.text for cell in cells)])
        text = text.replace("\n", " ")
        text = text if len(text) <= MAX_LINE else text[: MAX_LINE - 3] + "..."
        which = f"sample {rows[0] + 1}/{len(self.shown)}, " if len(self.shown) > 1 else ""
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
        shown: what is drawn of each row of the request.
        transient: remove the picture at the end, because the texts are printed on the same terminal
            next.
    """

    def __init__(
        self, tokenizer: Any, shown: Sequence[Shown], *, console: Any, transient: bool
    ) -> None:
        from rich.live import Live

        self.tokenizer, self.shown, self.console = tokenizer, shown, console
        # A mask is about as wide as the word that it hides.
        self.canvas_text = CanvasText(tokenizer, console.file, mask_width=3)
        self.live = Live(
            console=console, auto_refresh=False, transient=transient, vertical_overflow="ellipsis"
        )
        self.rows: range | None = None
        self.ages: list[np.ndarray] = []
        self.last_frame = 0.0

    def __enter__(self) -> Any:
        self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.live.__exit__(*exception)

    def on_step(self, rows: range, state: DenoiseStep) -> None:
        frame = _frame(rows, state, self.shown, self.tokenizer.mask_id)
        if rows != self.rows:
            self.rows, self.ages = rows, [np.zeros(len(row.tokens_T), int) for row in frame.rows]
        self.ages = [
            np.where(row.is_new_T | row.is_masked_T, 0, age_T + 1)
            for row, age_T in zip(frame.rows, self.ages, strict=True)
        ]
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
            self.row_text(self.shown[number].prompt, row, age_T)
            for number, row, age_T in zip(rows, frame.rows, self.ages, strict=True)
        ]
        panels: list[Any] = []
        lines_left = self.console.height - 2
        for row, text in zip(rows, texts):
            height = 2 + len(text.wrap(self.console, self.console.width - 4))
            if panels and height > lines_left:
                break
            lines_left -= height
            title = f"sample {row + 1}/{len(self.shown)}" if len(self.shown) > 1 else None
            panels.append(Panel(text, title=title, title_align="left", border_style=MASK_STYLE))
        return Group(header, *panels)

    def row_text(self, prompt: str, row: _Row, age_T: np.ndarray) -> Any:
        """Returns one row as styled text, with given tokens in the style of a prompt."""
        from rich.text import Text

        text = Text().append(prompt, style=PROMPT_STYLE)
        for cell in self.canvas_text.cells(row.tokens_T, row.is_given_T):
            youngest = min(age_T[column] for column in cell.columns)
            if cell.kind in (MASK, GIVEN):
                style = MASK_STYLE if cell.kind == MASK else PROMPT_STYLE
            elif youngest < len(AGE_STYLES):
                style = AGE_STYLES[youngest]
            else:
                style = END_STYLE if cell.kind == END else ""
            text.append(cell.text, style=style)
        return text


def make_show(tokenizer: Any, shown: Sequence[Shown], *, stream: TextIO, transient: bool) -> Any:
    """Returns the show that suits the stream: a context manager with the `on_step` that
    `generate_tokens` calls after each step.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveShow(tokenizer, shown, console=console, transient=transient)
    return LogShow(tokenizer, shown, stream=stream)
