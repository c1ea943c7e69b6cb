"""A trained model in memory: `llada_jax.load("runs/tiny")` gives logits, samples and the run's own record."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llada_jax import checkpoint as checkpoints
from llada_jax import sharding
from llada_jax.config import default_config
from llada_jax.errors import UserError
from llada_jax.hf import read
from llada_jax.hf.convert import WRITTEN
from llada_jax.models.transformer import Architecture
from llada_jax.run_record import run_record
from llada_jax.samplers.text import generate_text, generate_tokens
from llada_jax.state import Model, abstract_parameters, compute_dtype, make_model
from llada_jax.tokenizer import Tokenizer, load_same, load_tokenizer


class HuggingFace:
    """A Hugging Face directory, seen as a run that has not done a step: answers what llada_jax.checkpoint.Checkpoints does.

    Args:
        directory: with config.json, safetensors and a tokenizer.
        causal: what Llama and Qwen weights are taken for. True: what they are, an autoregressive model. False: the start of
            a masked diffusion model, with shifted output and a mask token whose row is new (DiffuLLaMA, arXiv 2410.17891).
        mask_token: a token of the tokenizer that is to be the mask; "" takes what it has, or adds one to a causal model's.

    Raises:
        UserError: config.json or the tokenizer cannot be used.
    """

    steps = (0,)

    def __init__(self, directory, *, causal: bool, mask_token: str = ""):
        self.directory = Path(directory)
        self.hf_config, self.layout, self._stored = read.read_config(directory)
        self.is_causal = causal and self.layout not in WRITTEN
        self.is_new_mask = not causal and self.layout not in WRITTEN
        self.tokenizer = load_tokenizer(directory, add_mask_token=self.layout not in WRITTEN, mask_token=mask_token)
        rows = self._stored.vocab_size
        if self.tokenizer.vocab_size > rows:
            if self.layout in WRITTEN:
                raise UserError(
                    f"{directory}: the tokenizer has {self.tokenizer.vocab_size} ids and the embedding {rows} rows; fetch "
                    "both from the same revision."
                )
            rows = -(-self.tokenizer.vocab_size // 64) * 64  # so that the head splits evenly over devices
        shift = self._stored.output_shift or self.is_new_mask
        self.architecture = dataclasses.replace(self._stored, vocab_size=rows, output_shift=shift)

    def run(self, step: int) -> dict:
        """Returns what stands in run.json of a checkpoint, as plain JSON values."""
        config = default_config()
        for name, value in dataclasses.asdict(self.architecture).items():
            config.model[name] = value
        config.objective.name = "autoregressive" if self.is_causal else "masked_diffusion"
        lengths = (self.hf_config.get(key) for key in ("max_sequence_length", "max_position_embeddings"))
        config.data.sequence_length = next((n for n in lengths if n), config.data.sequence_length)
        return run_record(
            config, self.architecture, self.tokenizer, data=[], step=0, tokens=0,
            special_ids=special_ids(self.tokenizer), chat_template=chat_template(self.tokenizer),
            source={"from": str(self.directory), "layout": self.layout, "config": self.hf_config},
        )  # fmt: skip

    def restore_params(self, step: int, abstract_params: dict, *, ema: bool = False) -> dict:
        """Returns the parameters in the given shardings; UserError when they cannot be read. `ema` is for runs alone."""
        params = read.read_params(self.directory, abstract_params)
        row_V = np.arange(self.architecture.vocab_size)
        is_new_V = row_V >= self._stored.vocab_size
        is_new_V |= self.is_new_mask & (row_V == self.tokenizer.mask_id)
        if not is_new_V.any():
            return params
        # Qwen has more rows than tokens: those beyond the tokens were never trained
        return read.fill_rows(params, is_new_V=is_new_V, is_trained_V=row_V < self.tokenizer.vocab_size)


# How published tokenizers call the token that ends a turn of a conversation.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of mask, eos, bos, pad and, where the tokenizer has one, eot (end of turn)."""
    ids = {"mask": tokenizer.mask_id, "eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    turns = [i for i in map(tokenizer.id_of, END_OF_TURN) if i is not None]
    return {**ids, "eot": turns[0]} if turns else ids


def chat_template(tokenizer: Tokenizer) -> str | None:
    """Returns the Jinja template of conversations that came with the tokenizer, if one did."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode()
    return json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("chat_template")


def find(checkpoint: str, *, causal: bool):
    """Returns the checkpoints of "WORKDIR[@STEP]" or of a Hugging Face directory, and the step meant.

    Args:
        causal: see HuggingFace.

    Raises:
        UserError: there is none.
    """
    if read.is_huggingface(checkpoint):
        return HuggingFace(checkpoint, causal=causal), 0
    return checkpoints.find(checkpoint)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters with all that is needed to use them.

    tokenizer: of the run. config: the run's config as a nested dict. params: nested dict of sharded float32 arrays.
    step: optimizer steps done. model: llada_jax.state.Model. run: run.json of the checkpoint. mesh: where params live.
    """

    tokenizer: object
    config: dict
    params: dict
    step: int
    model: Model
    run: dict
    mesh: Mesh

    @property
    def logits_fn(self):
        """The pure function (params, tokens_BT, segment_ids_BT, positions_BT) -> logits_BTV."""
        return self.model.logits_fn

    def logits(self, tokens_BT, segment_ids_BT=None, positions_BT=None) -> jax.Array:
        """Returns float32 logits [B, T, V]; segment 0 is padding, positions count from 0 by default."""
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return _logits(self.params, tokens_BT, jnp.asarray(segment_ids_BT), positions_BT, self.logits_fn)

    def generate(self, prompts, *, gen_length: int = 64, **settings) -> list[str]:
        """Returns the text that follows each prompt; settings are those of llada_jax.samplers.text.generate_text."""
        if isinstance(prompts, str):
            raise UserError(f"prompts={prompts!r} is one text; pass a list, as in generate([{prompts!r}]).")
        completions = generate_text(
            self.logits_fn, self.params, self.tokenizer, list(prompts), gen_length=gen_length, **settings
        )
        return [completion.text for completion in completions]

    def generate_tokens(self, prompt_BT, *, gen_length: int = 64, **settings):
        """Returns the canvas [B, T + gen_length] for prompts given as ids [B, T]; settings as in generate."""
        settings = {"mask_id": self.tokenizer.mask_id, "pad_id": self.tokenizer.pad_id, **settings}
        prompt_BT = np.asarray(prompt_BT, np.int32)
        generated_BT, _ = generate_tokens(self.logits_fn, self.params, prompt_BT, gen_length=gen_length, **settings)
        return np.concatenate([prompt_BT, generated_BT], axis=1)


def _logits_impl(params, tokens_BT, segment_ids_BT, positions_BT, logits_fn):
    return logits_fn(params, tokens_BT, segment_ids_BT, positions_BT)


_logits = jax.jit(_logits_impl, static_argnames="logits_fn")


def load(checkpoint: str, *, dtype: str = "auto", mesh: Mesh | None = None) -> Pretrained:
    """Loads a checkpoint for sampling and scoring.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory; Llama and Qwen are loaded as what they are, causal.
        dtype: of the matrix products: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or "bfloat16".
        mesh: where to put the parameters (llada_jax.sharding.make_mesh); None: the first device.

    The moving average of the parameters is taken where the run kept one.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    found, step = find(checkpoint, causal=True)
    run = found.run(step)
    if mesh is None:
        mesh = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), devices=jax.local_devices()[:1])
    config = run["config"]
    platform = sharding.platform(mesh)
    model = make_model(
        Architecture(**run["architecture"]),
        dtype=compute_dtype(dtype, platform),
        attention="xla",  # a canvas has any length, and the kernels want whole blocks
        causal=config["objective"]["name"] == "autoregressive",
    )
    params = found.restore_params(step, abstract_parameters(model, mesh), ema=config["optimizer"]["ema_decay"] > 0)
    if isinstance(found, HuggingFace):
        tokenizer = found.tokenizer
    else:
        directory = found.directory.parent / "tokenizer"
        tokenizer = load_same(directory, run["tokenizer"]["fingerprint"], of="the checkpoint")
    return Pretrained(tokenizer, config, params, step, model, run, mesh)
