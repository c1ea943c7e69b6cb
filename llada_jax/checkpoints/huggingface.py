"""A Hugging Face directory seen as a checkpoint: its architecture, tokenizer and weights."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from llada_jax.checkpoints.record import RunRecord, run_record
from llada_jax.checkpoints.workdir import find_checkpoint
from llada_jax.config import default_config
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.errors import UserError
from llada_jax.hf import read
from llada_jax.hf.config_json import WRITTEN
from llada_jax.paths import user_path


class HuggingFace:
    """A Hugging Face directory, seen as a run that has not done a step: it answers what
    llada_jax.checkpoints.workdir.Checkpoints answers.

    Args:
        directory: with config.json, safetensors and a tokenizer.
        causal: how Llama and Qwen weights are used. True: as what they are, an autoregressive
            model. False: the start of a masked diffusion model, with shifted output and a mask
            token whose row is new (DiffuLLaMA, arXiv 2410.17891).
        mask_token: the token of the tokenizer to use as the mask; "" takes the one that it has, or
            adds one to a causal model's.

    Raises:
        UserError: config.json or the tokenizer cannot be used.
    """

    steps = (0,)

    def __init__(self, directory, *, causal: bool, mask_token: str = ""):
        self.directory = Path(directory)
        self.hf_config, self.layout, self._stored = read.read_config(directory)
        self.is_causal = causal and self.layout not in WRITTEN
        self.is_new_mask = not causal and self.layout not in WRITTEN
        self.tokenizer = load_tokenizer(
            directory, add_mask_token=self.layout not in WRITTEN, mask_token=mask_token
        )
        rows = self._stored.vocab_size
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
            special_ids=special_ids(self.tokenizer),
            chat_template=chat_template(self.tokenizer),
            source={"from": str(self.directory), "layout": self.layout, "config": self.hf_config},
        )

    def restore_params(self, step: int, abstract_params: dict, *, ema: bool = False) -> dict:
        """Returns the parameters in the given shardings; UserError when they cannot be read. `ema`
        is for runs alone.
        """
        params = read.read_params(self.directory, abstract_params)
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


# How published tokenizers call the token that ends a turn of a conversation.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of mask, eos, bos, pad and, where there is one, eot (end of turn)."""
    ids = {
        "mask": tokenizer.mask_id,
        "eos": tokenizer.eos_id,
        "bos": tokenizer.bos_id,
        "pad": tokenizer.pad_id,
    }
    turns = [i for i in map(tokenizer.id_of, END_OF_TURN) if i is not None]
    return {**ids, "eot": turns[0]} if turns else ids


def chat_template(tokenizer: Tokenizer) -> str | None:
    """Returns the Jinja template of conversations that came with the tokenizer, if one did."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode()
    content = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    template = content.get("chat_template")
    if isinstance(template, list):  # several by name, of which one is for conversations
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template


def find_weights(checkpoint: str, *, causal: bool):
    """Returns the checkpoints of "WORKDIR[@STEP]" or of a Hugging Face directory, and the step
    meant.

    Args:
        causal: see HuggingFace.

    Raises:
        UserError: there is none.
    """
    if read.is_huggingface(user_path(checkpoint)):
        return HuggingFace(user_path(checkpoint), causal=causal), 0
    return find_checkpoint(checkpoint)
