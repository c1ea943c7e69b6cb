"""A Hugging Face directory seen as a checkpoint: its architecture, tokenizer and weights."""

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from llada_jax.checkpoints.record import FILE, RunRecord, run_record
from llada_jax.checkpoints.workdir import find_checkpoint
from llada_jax.config import default_config
from llada_jax.data.special_ids import stated_ids
from llada_jax.data.tokenizer import (
    Tokenizer,
    has_tokenizer,
    ids_alone,
    load_same,
    load_tokenizer,
)
from llada_jax.errors import UserError
from llada_jax.hf import read
from llada_jax.hf.config_json import WRITTEN, unpadded_vocabulary
from llada_jax.models.adapters import Lora, round_in_place
from llada_jax.paths import user_path


class HuggingFace:
    """A Hugging Face directory, seen as a run that has not done a step: it answers what
    llada_jax.checkpoints.workdir.Checkpoints answers.

    Args:
        directory: with config.json, safetensors and, in most cases, a tokenizer.
        causal: how Llama and Qwen weights are used. True: as what they are, an autoregressive
            model. False: the start of a masked diffusion model, with shifted output and a mask
            token whose row is new (DiffuLLaMA, arXiv 2410.17891).
        mask_token: the token of the tokenizer to use as the mask; "" takes the one that it has, or
            adds one to a causal model's.
        tokenizer: where the tokenizer is (llada_jax.data.tokenizer.load_tokenizer); "" takes that
            of the directory. Without one the ids that config.json states are known, and no text.

    Raises:
        UserError: config.json or the tokenizer cannot be used.
    """

    steps = (0,)

    def __init__(
        self,
        directory,
        *,
        causal: bool,
        mask_token: str = "",
        tokenizer: str | os.PathLike[str] = "",
    ):
        self.directory = Path(directory)
        self.hf_config, self.layout, self._stored = read.read_config(directory)
        self.is_causal = causal and self.layout not in WRITTEN
        self.is_new_mask = not causal and self.layout not in WRITTEN
        rows = self._stored.vocab_size
        self.tokenizer = _tokenizer_of_weights(
            directory,
            self.hf_config,
            num_rows=rows,
            is_causal_layout=self.layout not in WRITTEN,
            mask_token=mask_token,
            given=tokenizer,
        )
        if self.tokenizer.vocab_size > rows:
            if self.layout in WRITTEN:
                raise UserError(
                    f"{directory}: the tokenizer has {self.tokenizer.vocab_size} ids and the "
                    f"embedding {rows} rows; fetch both from the same revision."
                )
            # so that the head splits evenly over devices
            rows = -(-self.tokenizer.vocab_size // 64) * 64
        shift = self._stored.output_shift or self.is_new_mask
        self.architecture = dataclasses.replace(self._stored, vocab_size=rows, output_shift=shift)

    def record(self, step: int) -> RunRecord:
        """Returns the record that a workdir with these weights has at step 0."""
        config = default_config()
        for name, value in dataclasses.asdict(self.architecture).items():
            config.model[name] = value
        config.objective.name = "autoregressive" if self.is_causal else "masked_diffusion"
        lengths = (
            self.hf_config.get(key) for key in ("max_sequence_length", "max_position_embeddings")
        )
        config.data.sequence_length = next((n for n in lengths if n), config.data.sequence_length)
        return run_record(
            config,
            self.architecture,
            self.tokenizer,
            data=[],
            step=step,
            tokens=0,
            special_ids=self.tokenizer.special_ids,
            chat_template=self.tokenizer.chat_template,
            source={
                "from": str(self.directory),
                "layout": self.layout,
                "config": self.hf_config,
                "digest": self._digest,
            },
        )

    @functools.cached_property
    def _digest(self) -> str:
        return read.digest(self.directory)

    def restore_params(
        self, step: int, abstract_params: dict, *, ema: bool = False, lora: Lora | None = None
    ) -> dict:
        """Returns the parameters in the given shardings; UserError when they cannot be read, or
        were replaced meanwhile. `ema` is for runs alone.

        Args:
            lora: of a run that will freeze them: the matrices of the layers are rounded as it keeps
                them, one by one as they are read.
        """
        round_one = functools.partial(round_in_place, lora=lora or Lora())
        began = self._digest
        params = read.read_params(self.directory, abstract_params, then=round_one)
        # each file is opened by its name, so that some may be of one model and some of the next
        if read.digest(self.directory) != began:
            raise UserError(
                f"{self.directory} was replaced while it was read; repeat the command once "
                "nothing writes there."
            )
        row_V = np.arange(self.architecture.vocab_size)
        is_new_V = row_V >= self._stored.vocab_size
        is_new_V |= self.is_new_mask & (row_V == self.tokenizer.mask_id)
        if not is_new_V.any():
            return params
        # Qwen has more rows than tokens. Those after the last token were never trained, and would
        # pull the mean of the new rows towards their initialisation.
        return read.fill_rows(
            params, is_new_V=is_new_V, is_trained_V=row_V < self.tokenizer.vocab_size
        )


def _tokenizer_of_weights(
    directory,
    hf_config: dict,
    *,
    num_rows: int,
    is_causal_layout: bool,
    mask_token: str,
    given: str | os.PathLike[str],
) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face directory, the given one, or ids without texts."""
    if not given and has_tokenizer(directory):
        return load_tokenizer(directory, add_mask_token=is_causal_layout, mask_token=mask_token)
    # Tokens that were added later have ids after those of the tokenizer's own file.
    trained = stated_ids(hf_config, num_ids=num_rows, file=f"{directory}/config.json")
    if given:
        return load_tokenizer(
            user_path(given),
            add_mask_token=is_causal_layout,
            mask_token=mask_token,
            trained_ids=trained,
        )
    if mask_token:
        raise UserError(
            f"{directory} has no tokenizer in which {mask_token!r} could be looked up; give one "
            "with --tokenizer."
        )
    ends = hf_config.get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1:
        # No name says which it is, and it ends a text too.
        trained["eot"] = ends[1]
    try:
        return ids_alone(
            unpadded_vocabulary(hf_config, num_rows), trained, add_mask_token=is_causal_layout
        )
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error


def find_weights(
    checkpoint: str | os.PathLike[str], *, causal: bool, tokenizer: str | os.PathLike[str] = ""
):
    """Returns the checkpoints of "WORKDIR[@STEP]" or of a Hugging Face directory, and the step
    meant.

    Args:
        causal, tokenizer: see HuggingFace. Of a workdir the tokenizer is read by `tokenizer_of`.

    Raises:
        UserError: there is none.
    """
    if read.is_huggingface(user_path(checkpoint)):
        return HuggingFace(user_path(checkpoint), causal=causal, tokenizer=tokenizer), 0
    return find_checkpoint(checkpoint)


def tokenizer_of(found, record: RunRecord, *, given: str | os.PathLike[str] = "") -> Tokenizer:
    """Returns the tokenizer of a checkpoint.

    Args:
        found: of `find_weights`. record: of the checkpoint.
        given: a tokenizer to use, for weights that came without one; "": its own.

    Raises:
        UserError: it cannot be read, is not that of the checkpoint, or there is none and nothing
            says which ids are mask and EOS.
    """
    if isinstance(found, HuggingFace):
        return found.tokenizer
    workdir, ids = found.directory.parent, record.special_ids or {}
    is_known = record.tokenizer.kind != "none"
    own = None
    if has_tokenizer(workdir / "tokenizer"):
        own = load_same(workdir / "tokenizer", record.tokenizer.fingerprint, of="the checkpoint")
    elif ids:
        own = ids_alone(record.tokenizer.vocab_size, ids, add_mask_token=False)
    if own is None and not given:
        raise UserError(
            f"{workdir} has no tokenizer, and its {FILE} does not say which ids are mask and EOS; "
            "put WORKDIR/tokenizer back, or name it with --tokenizer."
        )
    if own is not None and not given:
        return own
    # Of weights that came without a tokenizer the other ids may be guesses.
    sure = {what: i for what, i in ids.items() if is_known or what in ("mask", "eos")}
    named = load_tokenizer(user_path(given), trained_ids=sure)
    num_ids, num_rows = record.tokenizer.vocab_size, record.architecture.vocab_size
    fits = named.vocab_size == num_ids if is_known else named.vocab_size <= num_rows
    if not fits or (own is not None and not own.behaves_like(named)):
        raise UserError(
            f"--tokenizer {given} ({named.vocab_size} ids) is not the tokenizer of {workdir} "
            f"({num_ids} ids in {num_rows} rows of the embedding); give that one."
        )
    return named
