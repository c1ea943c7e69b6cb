"""A trained model in memory: `llada_jax.load("runs/tiny/run")` gives logits, samples and the run's
own record.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llada_jax.checkpoints.huggingface import HuggingFace, find_weights
from llada_jax.checkpoints.record import RunRecord, reads_ema
from llada_jax.cluster import sharding
from llada_jax.data.tokenizer import Tokenizer, load_same
from llada_jax.errors import UserError
from llada_jax.evaluation.conditional import Question, Score, encode_pair, log_likelihoods
from llada_jax.evaluation.rolling import TextBound, bounds_of_texts
from llada_jax.models.attention import IN_PIECES
from llada_jax.models.model import (
    Model,
    abstract_parameters,
    check_mesh,
    compute_dtype,
    in_compute_dtype,
    make_model,
)
from llada_jax.samplers.batches import ignore_step
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.text import (
    Completion,
    continue_text,
    generate_text,
    generate_tokens,
    infill_text,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters with all that is needed to use them.

    tokenizer: of the run; see llada_jax.data.tokenizer.
    config: the run's config as a nested dict.
    params: nested dict of sharded arrays, float32 unless `load` was told otherwise.
    step: optimizer steps done.
    model: the network without its numbers; its functions take `params` first.
    run: run.json of the checkpoint.
    mesh: where params live.
    """

    tokenizer: Tokenizer
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
    def logits_fn(self) -> Callable[..., jax.Array]:
        """The pure function (params, tokens_BT, segment_ids_BT, positions_BT) -> logits_BTV.

        With start= and length= it returns the logits of those columns alone, see
        llada_jax.models.model.Model.logits_fn.
        """
        return self.model.logits_fn

    def logits(self, tokens_BT, segment_ids_BT=None, positions_BT=None) -> jax.Array:
        """Returns float32 logits [B, T, V].

        Args:
            tokens_BT: int32 ids, as an array or as lists of one length.
            segment_ids_BT: int32; a token sees those of its own segment, and 0 is padding. None:
                the whole row is one segment.
            positions_BT: int32; None counts from 0 at the start of the row.

        Raises:
            UserError: an id has no row in the embedding.
        """
        if not isinstance(tokens_BT, jax.core.Tracer):
            self._check_ids(tokens_BT)
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return _logits(
            self.params, tokens_BT, jnp.asarray(segment_ids_BT), positions_BT, self.logits_fn
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        gen_length: int = 64,
        block_length: int | None = None,
        steps: int | None = None,
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        stop_at_eos: bool = True,
        seed: int = 0,
        batch_size: int = 16,
        on_step: Callable[[Sequence[int], DenoiseStep], None] = ignore_step,
        **settings: Any,
    ) -> list[str]:
        """Returns the text that follows each prompt.

        An autoregressive model predicts it token by token, and refuses what is about denoising.

        Args:
            prompts: a list of texts; "" generates from nothing.
            gen_length: tokens to generate after each prompt.
            block_length: tokens denoised together, a divisor of gen_length; None: all of them.
            steps: passes through the network, a multiple of the number of blocks; None: gen_length,
                one token per step. With another `commit` than the schedule, the most that there can
                be.
            remasking: which proposals a step keeps first: "low_confidence", "random", "entropy",
                "margin", or "module:function" for an own rule.
            temperature: 0 takes the most likely tokens, 1 samples the model's distribution.
            cfg_scale: strength of guidance towards the prompt; 0 switches it off, at half the cost.
            stop_at_eos: end a text at the end-of-text token; False generates all tokens, as the
                published sampler.
            seed: the same seed gives the same texts, whatever batch_size is.
            batch_size: texts generated at a time.
            on_step: called as on_step(rows, state) after each step, see
                llada_jax.samplers.text.generate_tokens.
            settings: commit, revise, append, lookahead, top_k, top_p, eos, suppress, cache and
                refresh, see
                llada_jax.samplers.denoise.denoise and docs/sampling.md.

        Raises:
            UserError: a setting is out of range, or prompts is a single text.
        """
        completions = self.complete(
            prompts,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            remasking=remasking,
            temperature=temperature,
            cfg_scale=cfg_scale,
            stop_at_eos=stop_at_eos,
            seed=seed,
            batch_size=batch_size,
            on_step=on_step,
            **settings,
        )
        return [completion.text for completion in completions]

    def complete(self, prompts: Sequence[str], **settings: Any) -> list[Completion]:
        """Returns what `generate` does, with the tokens and the passes that each text needed."""
        _check_list(prompts, "generate")
        if self.record.mask.causal:
            if settings.pop("on_step", ignore_step) is not ignore_step:
                raise UserError(
                    "on_step is called between steps of denoising, and this model predicts one "
                    "token after the other; leave it out."
                )
            return continue_text(
                self.model.cache_fns, self.params, self.tokenizer, list(prompts), **settings
            )
        return generate_text(
            self.logits_fn,
            self.params,
            self.tokenizer,
            list(prompts),
            cache_fns=self.model.cache_fns,
            shadow_fn=self.model.shadow_fn,
            **settings,
        )

    def best_of(
        self, completions: Sequence[Completion], num: int, *, mc_samples: int = 32, seed: int = 0
    ) -> list[Completion]:
        """Returns, of every `num` completions in a row, the one that the model finds most likely.

        Texts are compared by their log-likelihood per token, because by the sum of it the shortest
        would win, and under the same noise. An empty text has no likelihood and is the last choice.

        Args:
            completions: of `complete`, those of one prompt next to each other.
            mc_samples, seed: of the estimate for masked diffusion, see `score`.
        """
        encode = self.tokenizer.encode
        is_empty = [not completion.tokens for completion in completions]
        pairs = [(encode(c.prompt), c.tokens) for c in completions if c.tokens]
        scores = iter(self.score(pairs, mc_samples=mc_samples, seed=seed) if pairs else ())
        per_token = []
        for empty in is_empty:
            score = None if empty else next(scores)
            per_token.append(-np.inf if score is None else score.log_likelihood / score.num_tokens)
        best = [
            first + int(np.argmax(per_token[first : first + num]))
            for first in range(0, len(completions), num)
        ]
        return [completions[number] for number in best]

    def infill(self, texts: Sequence[str], **settings: Any) -> list[str]:
        """Returns the texts with their gaps filled: "The [MASK:4] sat on the mat." has one of four
        tokens.

        Args:
            texts: a list of texts, each with at least one gap; see
                llada_jax.samplers.text.parse_gaps.
            settings: steps, remasking, commit, revise, temperature, top_k, top_p, cfg_scale,
                suppress, seed and batch_size as in `generate`; steps=None fills one token per step.

        Raises:
            UserError: a text has no gap, a setting is out of range, or the model is autoregressive.
        """
        _check_list(texts, "infill")
        check_can_infill(self.record)
        completions = infill_text(
            self.logits_fn,
            self.params,
            self.tokenizer,
            list(texts),
            shadow_fn=self.model.shadow_fn,
            **settings,
        )
        return [completion.text for completion in completions]

    def generate_tokens(
        self,
        prompt_BT,
        *,
        gen_length: int = 64,
        block_length: int | None = None,
        steps: int | None = None,
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        eos_id: int | None = None,
        mask_id: int | None = None,
        pad_id: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        on_step: Callable[[Sequence[int], DenoiseStep], None] = ignore_step,
        **settings: Any,
    ) -> np.ndarray:
        """Returns prompts and generations as ids, int32 [B, T + gen_length].

        Args:
            prompt_BT: ids of prompts of one length, int [B, T].
            eos_id: a row that has generated this token is filled up with it, and sampling stops
                when all rows have. None, the default, generates all gen_length tokens.
            mask_id, pad_id: None takes the tokenizer's.
            The others: see `generate`.

        Raises:
            UserError: an id has no row in the embedding, a setting is out of range, or the model is
                autoregressive.
        """
        if self.record.mask.causal:
            raise UserError(
                "generate_tokens denoises, and this model has never seen a mask; use generate."
            )
        self._check_ids(prompt_BT, eos_id, mask_id, pad_id)
        prompt_BT = np.asarray(prompt_BT, np.int32)
        generated_BT, _ = generate_tokens(
            self.logits_fn,
            self.params,
            prompt_BT,
            mask_id=self.tokenizer.mask_id if mask_id is None else mask_id,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            remasking=remasking,
            temperature=temperature,
            cfg_scale=cfg_scale,
            eos_id=eos_id,
            num_ids=self.tokenizer.vocab_size,
            cache_fns=self.model.cache_fns,
            shadow_fn=self.model.shadow_fn,
            seed=seed,
            batch_size=batch_size,
            on_step=on_step,
            **settings,
        )
        return np.concatenate([prompt_BT, generated_BT], axis=1)

    def score(
        self,
        pairs: Sequence,
        *,
        mc_samples: int = 128,
        estimator: str = "exact_count",
        cfg_scale: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[Score]:
        """Returns the log-likelihood of each answer after its prompt, with its standard error.

        For masked diffusion it is an estimate of a lower bound, and for an autoregressive model it
        is exact. Answers to the same prompt are scored under the same noise.

        Args:
            pairs: (prompt, answer), each a text or a list of token ids; or
                llada_jax.evaluation.conditional.Question, which may also hold what comes after.
            mc_samples: sets of masked tokens drawn for an answer. An answer that has no more of
                them, such as one of 7 tokens for 128, is scored without drawing.
            estimator: "exact_count" or "uniform_time", see llada_jax.evaluation.conditional.
            cfg_scale: strength of guidance towards the prompt; 0 switches it off.
            seed: of the noise. batch_size: rows in one pass.

        Raises:
            UserError: an answer is empty, an id has no row in the embedding, a pair is longer than
                the model's context, or a setting is out of range.
        """
        questions = [self._question(pair) for pair in pairs]
        for question in questions:
            self._check_ids(*question[:3])
        longest = self.config["data"]["sequence_length"]
        for number, question in enumerate(questions):
            length = sum(len(part) for part in question[:3])
            if length > longest:
                raise UserError(
                    f"Pair {number} has {length} tokens and the model was trained on rows of "
                    f"{longest}; shorten its prompt, or bound a whole text with score_text."
                )
        return log_likelihoods(
            self.model,
            self.params,
            questions,
            mask=self.record.mask,
            ids=self.tokenizer,
            num_samples=mc_samples,
            estimator=estimator,
            cfg_scale=cfg_scale,
            seed=seed,
            batch_size=batch_size,
            mesh=self.mesh,
        )

    def _check_ids(self, *ids) -> None:
        """Raises UserError for token ids without a row in the embedding, which a gather would
        silently clip to one that has.
        """
        num_rows = self.record.architecture.vocab_size
        for some in ids:
            array = np.asarray([] if some is None else some)
            is_wrong = (array < 0) | (array >= num_rows)
            if is_wrong.any():
                raise UserError(
                    f"{array[is_wrong].flat[0]} is not a token id of this model, whose embedding "
                    f"has {num_rows} rows; give ids from 0 to {num_rows - 1}."
                )

    def _question(self, pair) -> Question:
        if isinstance(pair, Question):
            return pair
        if isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"{pair!r} is not a pair; pass a list of (prompt, answer).")
        prompt, answer = pair
        if isinstance(prompt, str) and isinstance(answer, str):
            return encode_pair(self.tokenizer, prompt, answer)
        return Question(tuple(prompt), tuple(answer))

    def score_text(
        self,
        texts: Sequence[str],
        *,
        window: int | None = None,
        context: int | None = None,
        mc_samples: int = 128,
        estimator: str = "exact_count",
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[TextBound]:
        """Returns the bound on each whole text, in nats per token and bits per byte.

        Args:
            texts: of any length.
            window: tokens in one pass; None: the rows that the model was trained on.
            context: tokens of a window that are only seen; None: half of it.
            The others: see `score`; mc_samples are drawn for each window.

        Raises:
            UserError: texts is a single text, one of them is empty, or a setting is out of range.
        """
        if isinstance(texts, str):
            raise UserError(
                f"texts={texts[:40]!r} is one text; pass a list, as in score_text([text])."
            )
        return bounds_of_texts(
            self.model,
            self.params,
            list(texts),
            tokenizer=self.tokenizer,
            length=self.config["data"]["sequence_length"] if window is None else window,
            context=context,
            mask=self.record.mask,
            num_samples=mc_samples,
            estimator=estimator,
            seed=seed,
            batch_size=batch_size,
            mesh=self.mesh,
        )


def check_can_infill(record: RunRecord) -> None:
    """Raises UserError for a model that sees no text behind a gap."""
    if record.mask.causal:
        raise UserError(
            f"A model of objective.name={record.objective!r} reads from left to right and cannot "
            "fill in a gap; use a checkpoint of masked_diffusion."
        )


def _check_list(texts: Sequence[str], function: str) -> None:
    if isinstance(texts, str):
        name = "prompts" if function == "generate" else "texts"
        raise UserError(
            f"{name}={texts!r} is one text; pass a list, as in {function}([{texts!r}])."
        )


def _logits_impl(params, tokens_BT, segment_ids_BT, positions_BT, logits_fn):
    return logits_fn(params, tokens_BT, segment_ids_BT, positions_BT)


_logits = jax.jit(_logits_impl, static_argnames="logits_fn")


def load(
    checkpoint: str,
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    ema: bool | None = None,
    keep_float32: bool = True,
) -> Pretrained:
    """Loads a checkpoint for sampling and scoring.

    Args:
        checkpoint: WORKDIR, WORKDIR@STEP, or a Hugging Face directory. Llama and Qwen are loaded as
            what they are, causal.
        dtype: of the matrix products: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or
            "bfloat16".
        mesh: where to put the parameters (llada_jax.cluster.sharding.make_mesh); None: the first
            device.
        ema: True loads the moving average of the parameters, False the parameters themselves; None
            loads the average where the run kept one.
        keep_float32: False keeps the matrices in the dtype of the products, which changes no score
            and no sample; in bfloat16 they take half of the memory.

    Raises:
        UserError: there is no checkpoint, it cannot be read, its run kept no moving average, or the
            mesh does not divide the network.
    """
    found, step = find_weights(checkpoint, causal=True)
    record = found.record(step)
    if mesh is None:
        mesh = sharding.one_device_mesh()
    check_mesh(record.architecture, mesh)
    computed = compute_dtype(dtype, sharding.platform(mesh))
    model = make_model(
        record.architecture,
        dtype=computed,
        # A canvas has any length, and its padding is on the left: the kernels want multiples of
        # 128, and cuDNN padding on the right.
        attention=IN_PIECES,
        mask=record.mask,
    )
    params = found.restore_params(
        step, abstract_parameters(model, mesh), ema=reads_ema(record, ema, checkpoint)
    )
    if not keep_float32:
        params = in_compute_dtype(params, computed)
    if isinstance(found, HuggingFace):
        tokenizer = found.tokenizer
    else:
        directory = found.directory.parent / "tokenizer"
        tokenizer = load_same(directory, record.tokenizer.fingerprint, of="the checkpoint")
    run = record.to_json()
    return Pretrained(tokenizer, run["config"], params, step, model, run, mesh)
