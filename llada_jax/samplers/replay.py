"""A sample as a page that replays its denoising in any browser, without a network."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.show import CanvasText, Cell, Shown

PAGE = Path(__file__).with_name("replay.html")
PLACEHOLDER = "RECORDING"


class Recording:
    """Listens to the sampler, and keeps what each step has changed of every sample.

    The sampler is asked for `with_confidence`.

    Args:
        shown: what is drawn of each row of the request.
    """

    def __init__(self, tokenizer: Any, shown: Sequence[Shown]) -> None:
        self.tokenizer, self._shown = tokenizer, shown
        # An in-memory stream has no encoding of its own: a page can show every character.
        self._canvas_text = CanvasText(tokenizer, io.StringIO(), mask_width=2)
        self._tokens = [np.asarray(row.tokens) for row in shown]
        self._cells = [self._draw(row, row.tokens) for row in shown]
        self._samples: list[dict[str, Any]] = [
            {"prompt": row.prompt, "num_steps": 0, "start": _rows(cells), "frames": []}
            for row, cells in zip(shown, self._cells, strict=True)
        ]
        self._seen: set[int] = set()

    def on_step(self, rows: range, state: DenoiseStep) -> None:
        """Called after each step, see llada_jax.samplers.text.generate_tokens."""
        arrays = jax.device_get((state.canvas_BT, state.is_new_BT, state.confidence_BT))
        for place, row in enumerate(rows):
            shown = self._shown[row]
            tokens, is_new, confidence = (array[place, shown.columns] for array in arrays)
            is_masked = tokens == self.tokenizer.mask_id
            # A token that was taken back and revealed in the same step is not new to the sampler.
            is_new = (is_new | (tokens != self._tokens[row])) & ~is_masked
            hidden = is_masked & (self._tokens[row] != self.tokenizer.mask_id)
            cells, before = self._draw(shown, tokens), self._cells[row]
            changed = {column: cell for column, cell in cells.items() if cell != before.get(column)}
            self._seen.update(tokens[is_new].tolist())
            self._samples[row]["frames"].append(
                {
                    "step": state.step,
                    "hidden": np.flatnonzero(hidden).tolist(),
                    "revealed": [
                        [column, int(tokens[column]), _number(confidence[column])]
                        for column in np.flatnonzero(is_new).tolist()
                    ],
                    "removed": [column for column in before if column not in cells],
                    "cells": _rows(changed),
                }
            )
            if is_new.any() or hidden.any():
                self._samples[row]["num_steps"] = state.step
            self._tokens[row], self._cells[row] = tokens, cells

    def page(self, title: str) -> str:
        """Returns the page.

        Args:
            title: the checkpoint, for example.
        """
        samples = [{**sample, "frames": _without_rest(sample)} for sample in self._samples]
        tokens = {token: self._name(token) for token in sorted(self._seen)}
        data = json.dumps({"title": title, "tokens": tokens, "samples": samples})
        # Inside of a script element only "<" can begin a tag, and JSON has another way to write it.
        return PAGE.read_text(encoding="utf-8").replace(PLACEHOLDER, data.replace("<", "\\u003c"))

    def _draw(self, shown: Shown, tokens: Sequence[int] | np.ndarray) -> dict[int, Cell]:
        cells = self._canvas_text.cells(tokens, shown.is_given)
        return {cell.columns.start: cell for cell in cells}

    def _name(self, token: int) -> str:
        """Returns how a token is called where it is pointed at."""
        if token in self.tokenizer.end_ids:
            return self.tokenizer.piece(token) or "end of text"
        text = self._canvas_text.decode([token])
        return json.dumps(text, ensure_ascii=False) if "\ufffd" not in text else f"byte {token}"


def _rows(cells: dict[int, Cell]) -> list[list]:
    """Returns cells as the page reads them: first column, number of columns, text, kind."""
    return [[column, len(cell.columns), cell.text, cell.kind] for column, cell in cells.items()]


def _number(confidence: np.floating) -> float | None:
    # JSON has no NaN, and three digits are all that is shown.
    return None if math.isnan(confidence) else round(float(confidence), 4)


def _without_rest(sample: dict[str, Any]) -> list[dict]:
    """Returns the frames of a sample up to the last that changed it."""
    frames = sample["frames"]
    while frames and frames[-1]["step"] > sample["num_steps"]:
        frames = frames[:-1]
    return frames
