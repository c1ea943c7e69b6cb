"""What training does with a row of dialogues before it is part of a batch: one answer of each
dialogue is drawn, and end-of-text tokens fill it up. Settings that would spoil dialogues are
refused first.
"""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from llada_jax.data.records import DatasetInfo
from llada_jax.errors import UserError


def check_dialogues(
    infos: list[DatasetInfo],
    *,
    attend_across_documents: bool,
    batch_size: int = 1,
    random_length_probability: float = 0.0,
    eos_padding: int = 0,
    padding_cycle: Sequence[int] = (),
    split_probability: float = 0.0,
    length_buckets: Sequence[int] = (),
) -> None:
    """Raises UserError for settings that would spoil dialogues, or that need some."""
    for info in infos:
        if info.dialogues and random_length_probability:
            raise UserError(
                f"{info.directory} holds dialogues, whose answers "
                f"config.data.random_length_probability={random_length_probability} would cut off; "
                "set it to 0."
            )
        if info.dialogues and info.dialogues.are_pairs and attend_across_documents:
            raise UserError(
                f"{info.directory} holds pairs, whose answers must not see each other; set "
                "config.data.attend_across_documents=False."
            )
        if info.dialogues and info.dialogues.rows == "packed" and attend_across_documents:
            raise UserError(
                f"{info.directory} holds several dialogues in a row, which must not see each "
                "other; set config.data.attend_across_documents=False, or prepare it with "
                "--chat rows=padded."
            )
        is_padded = info.dialogues and info.dialogues.rows == "padded"
        if eos_padding and not (is_padded and not info.dialogues.are_pairs):  # type: ignore[union-attr]
            raise UserError(
                f"config.data.eos_padding={eos_padding} fills up rows of one dialogue each, and "
                f"{info.directory} has others; prepare with --chat rows=padded, or set it to "
                "0."
            )
        if info.dialogues and info.dialogues.are_pairs and split_probability:
            raise UserError(
                f"{info.directory} holds pairs, whose answers config.data.split_probability="
                f"{split_probability} would part from their prompts; set it to 0."
            )
        if eos_padding and split_probability:
            raise UserError(
                f"config.data.eos_padding={eos_padding} fills up whole rows, and "
                f"config.data.split_probability={split_probability} cuts rows in two; set one of "
                "them to 0."
            )
        if length_buckets and not is_padded:
            raise UserError(
                f"config.data.length_buckets={tuple(length_buckets)} cuts padding off, and the "
                f"rows of {info.directory} are full; prepare with --chat rows=padded, or leave the "
                "buckets empty."
            )
        for token in padding_cycle:
            special = (info.tokenizer["mask_id"], info.tokenizer["eos_id"])
            is_eos_alone = token == special[1] and len(padding_cycle) == 1
            if not 0 <= token < info.vocab_size or (token in special and not is_eos_alone):
                raise UserError(
                    f"config.data.padding_cycle={tuple(padding_cycle)}: {token} is not an ordinary "
                    f"id of the {info.vocab_size} of {info.directory} (mask and end-of-text are "
                    f"{special[0]} and {special[1]}); name ids that no text uses."
                )
    if eos_padding and batch_size % eos_padding:
        raise UserError(
            f"config.data.batch_size={batch_size} must be a multiple of "
            f"config.data.eos_padding={eos_padding}; change one of them."
        )


def draw_answers(eos_id: int) -> Callable[[dict, np.random.Generator], dict]:
    """Returns the map from a row of dialogues to one in which a single answer of each is maskable.

    Every answer of a dialogue is as likely. What follows the drawn one is taken out of the row, the
    end-of-text token at the end of the document excepted, and the rest moves together. (LLaDA,
    arXiv 2502.09992, appendix B.1: a dialogue of n turns becomes n pairs, of which one is sampled.)
    """

    def draw(row: dict, rng: np.random.Generator) -> dict:
        tokens_T, segment_ids_T = row["tokens"], row["segment_ids"]
        is_maskable_T = row["is_maskable"].copy()
        is_kept_T = segment_ids_T > 0
        for segment in range(1, int(segment_ids_T.max(initial=0)) + 1):
            (places,) = np.nonzero(segment_ids_T == segment)
            answers = _runs(places[is_maskable_T[places]])
            if len(answers) < 2:
                continue
            drawn = answers[int(rng.integers(len(answers)))]
            end, last = drawn[-1], places[-1]
            is_maskable_T[places] = False
            is_maskable_T[drawn] = True
            is_kept_T[end + 1 : last + 1] = False
            if tokens_T[end] != eos_id and tokens_T[last] == eos_id:
                is_kept_T[last] = is_maskable_T[last] = True
        return _compacted({**row, "is_maskable": is_maskable_T}, is_kept_T)

    return draw


def _runs(places: np.ndarray) -> list[np.ndarray]:
    """Splits ascending places where they are not consecutive."""
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []


def _compacted(row: dict, is_kept_T: np.ndarray) -> dict:
    """Takes tokens out of a row, of which no document loses its beginning."""
    num_kept = int(is_kept_T.sum())
    if num_kept == int((row["segment_ids"] > 0).sum()):
        return row
    compacted = {}
    for name, values_T in row.items():
        compacted[name] = np.zeros_like(values_T)
        compacted[name][:num_kept] = values_T[is_kept_T]
    segment_ids = compacted["segment_ids"][:num_kept]
    starts = np.flatnonzero(np.diff(segment_ids, prepend=0))
    lengths = np.diff(np.append(starts, num_kept))
    compacted["positions"][:num_kept] = np.arange(num_kept) - np.repeat(starts, lengths)
    return compacted


def split_in_two(probability: float) -> Callable[[dict, np.random.Generator], dict]:
    """Returns the map that cuts a row, with this probability, between two of its tokens, so that
    the document there becomes two, which do not see each other (iLLaDA, arXiv 2606.25331: 30%).
    """

    def split(row: dict, rng: np.random.Generator) -> dict:
        segment_ids_T, positions_T = row["segment_ids"], row["positions"]
        num_tokens = int((segment_ids_T > 0).sum())
        is_split = rng.random() < probability
        if not is_split or num_tokens < 2:
            return row
        cut = int(rng.integers(1, num_tokens))
        is_after_T = (segment_ids_T > 0) & (np.arange(len(segment_ids_T)) >= cut)
        if segment_ids_T[cut - 1] != segment_ids_T[cut]:
            # Between two documents, which are apart already.
            return row
        is_rest_T = is_after_T & (segment_ids_T == segment_ids_T[cut])
        return {
            **row,
            "segment_ids": segment_ids_T + is_after_T.astype(np.int32),
            "positions": np.where(is_rest_T, positions_T - positions_T[cut], positions_T),
        }

    return split


class EosPadded(grain.MapDataset):
    """Fills every row up to the longest of its group, as part of the answer: maskable, and seen by
    all of the row.

    The groups are `num_rows` consecutive rows, and stand for the small batches of one device in
    which the published recipe pads (LLaDA, arXiv 2502.09992, appendix B.1). They follow from the
    global number of a row, so that a row is the same on any number of hosts. A row of a group is
    read once for each row of the group.
    """

    def __init__(self, parent: grain.MapDataset, *, num_rows: int, cycle: tuple[int, ...]):
        """cycle: the tokens that fill a row up, in turn: the end-of-text token alone as published,
        or several others (rainbow padding, arXiv 2510.03680, which has seven), so that the model
        does not learn that any token may be end-of-text.
        """
        super().__init__(parent)
        self._num_rows, self._cycle = num_rows, np.array(cycle, np.int32)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        first = index - index % self._num_rows
        group = [self._parent[first + n] for n in range(self._num_rows)]
        length = max(int((row["segment_ids"] > 0).sum()) for row in group)
        row = group[index - first]
        place_T = np.arange(len(row["tokens"]))
        num_own = int((row["segment_ids"] > 0).sum())
        fill_T = self._cycle[(place_T - num_own) % len(self._cycle)]
        is_filled_T = (row["segment_ids"] == 0) & (place_T < length)
        return {
            "tokens": np.where(is_filled_T, fill_T, row["tokens"]).astype(np.int32),
            "segment_ids": np.where(is_filled_T, 1, row["segment_ids"]).astype(np.int32),
            "positions": np.where(is_filled_T, place_T, row["positions"]).astype(np.int32),
            "is_maskable": row["is_maskable"] | is_filled_T,
        }


class BucketCut(grain.MapDataset):
    """Cuts the padding off whole batches, down to one of a few lengths.

    The length follows from all rows of the global batch, so that every host has the same: each
    reads the rows of the others too, which costs about 0.1 ms per row of T = 4096. To ask them
    would be a collective at every step.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        every_row: grain.MapDataset,
        *,
        num_rows: int,
        lengths: tuple[int, ...],
    ):
        """parent: the batches of this host. every_row: the rows of all hosts, num_rows for each
        step. lengths: ascending.
        """
        super().__init__([parent, every_row])
        self._num_rows, self._lengths = num_rows, lengths

    def __len__(self) -> int:
        return len(self._parents[0])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batches, rows = self._parents
        first = index * self._num_rows
        sizes = [(rows[first + n]["segment_ids"] > 0).sum() for n in range(self._num_rows)]
        longest = int(max(sizes))
        length = min(length for length in self._lengths if length >= longest)
        return {name: array[:, :length] for name, array in batches[index].items()}
