"""A trained model in memory: `llada_jax.load("runs/tiny")` gives logits, samples and the run's own
record.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llada_jax.checkpoints.huggingface import HuggingFace, find_weights
from llada_jax.checkpoints.record import RunRecord
from llada_jax.cluster import sharding
from llada_jax.data.tokenizer import load_same
from llada_jax.errors import UserError
from llada_jax.models.model import Model, abstract_parameters, compute_dtype, make_model
from llada_jax.samplers.text import generate_text, generate_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters with all that is needed to use them.

    tokenizer: of the run. config: the run's config as a nested dict. params: nested dict of sharded
    float32 arrays. step: optimizer steps done. model: llada_jax.models.model.Model. run: run.json
    of the checkpoint. mesh: where params live.
    """

    tokenizer: object
    config: dict
    params: dict
    step: int
    model: Model
    run: dict
    mesh: Mesh

    @property
    def record(self) -> RunRecord:
        """The typed form of `run`."""
        return RunRecord.from_json(self.run, file="model.run")

    @property
    def logits_fn(self):
        """The pure function (params, tokens_BT, segment_ids_BT, positions_BT) -> logits_BTV."""
        return self.model.logits_fn

    def logits(self, tokens_BT, segment_ids_BT=None, positions_BT=None) -> jax.Array:
        """Returns float32 logits [B, T, V]; segment 0 is padding, positions count from 0 by
        default.
        """
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return _logits(
            self.params, tokens_BT, jnp.asarray(segment_ids_BT), positions_BT, self.logits_fn
        )

    def generate(self, prompts, *, gen_length: int = 64, **settings) -> list[str]:
        """Returns the text that follows each prompt; settings are those of
        llada_jax.samplers.text.generate_text.
        """
        if isinstance(prompts, str):
            raise UserError(
                f"prompts={prompts!r} is one text; pass a list, as in generate([{prompts!r}])."
            )
        completions = generate_text(
            self.logits_fn,
            self.params,
            self.tokenizer,
            list(prompts),
            gen_length=gen_length,
            **settings,
        )
        return [completion.text for completion in completions]

    def generate_tokens(self, prompt_BT, *, gen_length: int = 64, **settings):
        """Returns the canvas [B, T + gen_length] for prompts given as ids [B, T]; settings as in
        generate.
        """
        settings = {"mask_id": self.tokenizer.mask_id, "pad_id": self.tokenizer.pad_id, **settings}
        prompt_BT = np.asarray(prompt_BT, np.int32)
        generated_BT, _ = generate_tokens(
            self.logits_fn, self.params, prompt_BT, gen_length=gen_length, **settings
        )
        return np.concatenate([prompt_BT, generated_BT], axis=1)


def _logits_impl(params, tokens_BT, segment_ids_BT, positions_BT, logits_fn):
    return logits_fn(params, tokens_BT, segment_ids_BT, positions_BT)


_logits = jax.jit(_logits_impl, static_argnames="logits_fn")


def load(checkpoint: str, *, dtype: str = "auto", mesh: Mesh | None = None) -> Pretrained:
    """Loads a checkpoint for sampling and scoring.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory; Llama and Qwen are loaded as
            what they are, causal.
        dtype: of the matrix products: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or
            "bfloat16".
        mesh: where to put the parameters (llada_jax.cluster.sharding.make_mesh); None: the first
            device.

    The moving average of the parameters is taken where the run kept one.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    found, step = find_weights(checkpoint, causal=True)
    record = found.record(step)
    if mesh is None:
        mesh = sharding.one_device_mesh()
    platform = sharding.platform(mesh)
    model = make_model(
        record.architecture,
        dtype=compute_dtype(dtype, platform),
        attention="xla",  # a canvas has any length, and the kernels want whole blocks
        causal=record.mask.causal,
    )
    params = found.restore_params(step, abstract_parameters(model, mesh), ema=record.keeps_ema)
    if isinstance(found, HuggingFace):
        tokenizer = found.tokenizer
    else:
        directory = found.directory.parent / "tokenizer"
        tokenizer = load_same(directory, record.tokenizer.fingerprint, of="the checkpoint")
    run = record.to_json()
    return Pretrained(tokenizer, run["config"], params, step, model, run, mesh)
