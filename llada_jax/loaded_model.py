"""A trained model in memory: logits, samples, scores, and the run's own record."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from llada_jax.arguments import checked
from llada_jax.checkpoints.checksums import checksums
from llada_jax.checkpoints.record import RunRecord
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import UserError
from llada_jax.evaluation.answer_rows import Question
from llada_jax.evaluation.conditional import Score, log_likelihoods
from llada_jax.evaluation.rolling import TextBound, bounds_of_texts
from llada_jax.models.model import Model
from llada_jax.request_checks import (
    as_question,
    check_can_infill,
    check_ids,
    check_questions,
    check_token_rows,
    length_hint,
    list_of_texts,
    surprises,
    window_of,
)
from llada_jax.samplers.batches import ignore_step
from llada_jax.samplers.commit import SCHEDULE
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.revise import NONE
from llada_jax.samplers.text import (
    Completion,
    continue_text,
    generate_text,
    generate_tokens,
    infill_text,
    parse_gaps,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Parameters with all that is needed to use them; a notebook shows the short fields alone.

    tokenizer: of the run; see llada_jax.data.tokenizer.
    params: nested dict of sharded arrays, float32 unless keep_float32=False, which on GPUs also
        takes stacked blocks apart (llada_jax.models.layers.by_layer).
    step: optimizer steps done.
    model: the network, whose functions take `params` first, for rows of one segment each.
    config, run: the run's config as a nested dict, and its run.json.
    mesh: where params live.
    """

    tokenizer: Tokenizer
    config: dict = dataclasses.field(repr=False)
    params: dict = dataclasses.field(repr=False)
    step: int
    model: Model = dataclasses.field(repr=False)
    run: dict = dataclasses.field(repr=False)
    mesh: Mesh

    @property
    def record(self) -> RunRecord:
        """The typed form of `run`."""
        return RunRecord.from_json(self.run, file="model.run")

    @property
    def num_rows(self) -> int:
        """Rows of the embedding; some of the last may belong to no id of the tokenizer."""
        return self.record.architecture.vocab_size

    @property
    def checksums(self) -> dict[str, int]:
        """{path of a parameter: checksum of its values}, the same on every mesh."""
        return checksums({"params": self.params})["params"]

    @property
    def logits_fn(self) -> Callable[..., jax.Array]:
        """The pure function (params, tokens_BT, segment_ids_BT, positions_BT) -> logits_BTV.

        With start= and length= it returns the logits of those columns alone, see
        llada_jax.models.model.Model.logits_fn.
        """
        return self.model.for_any_rows.logits_fn

    def logits(
        self,
        tokens_BT: ArrayLike | Sequence[Sequence[int]],
        segment_ids_BT: ArrayLike | None = None,
        positions_BT: ArrayLike | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, T, V].

        Args:
            tokens_BT: int32 ids, as an array or as lists of one length.
            segment_ids_BT: int32; a token sees those of its own segment, and 0 is padding. None:
                the whole row is one segment.
            positions_BT: int32; None counts from 0 at the start of the row.

        Raises:
            UserError: tokens_BT is empty, its rows have several lengths, or an id has no row in the
                embedding.
        """
        if not isinstance(tokens_BT, jax.core.Tracer):
            check_token_rows(self.num_rows, "tokens_BT", tokens_BT)
            if not np.size(tokens_BT):
                raise UserError("tokens_BT has no token; give at least one row of one token.")
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return _logits(
            self.params, tokens_BT, jnp.asarray(segment_ids_BT), positions_BT, self.logits_fn
        )

    @checked
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
        commit: str = SCHEDULE,
        revise: str = NONE,
        append: bool = False,
        lookahead: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: str = "free",
        suppress: Sequence[int] = (),
        cache: str = "none",
        refresh: int = 0,
        on_step: Callable[[range, DenoiseStep], None] = ignore_step,
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
            stop_at_eos: end a text at the end-of-text token or the end of a turn; False generates
                all tokens, as the published sampler.
            seed: the same seed gives the same texts, whatever batch_size is.
            batch_size: texts generated at a time.
            commit: how many proposals a step keeps: "schedule", or a rule such as "threshold=0.9".
            revise: which kept tokens are masked again: "none", or a rule such as "wino=0.9".
            append: later blocks are not there, instead of there as masks, while one is denoised.
            lookahead: tokens behind the current block that are there; None: all.
            top_k, top_p: draw from the most likely tokens alone; 0 and 1 keep every token.
            eos: "free", "never" proposed, or kept "last".
            suppress: token ids that are never proposed.
            cache, refresh: keep keys and values ("prefix" or "dual") and compute them again in
                every `refresh`-th step of a block; 0: once per block.
            on_step: called as on_step(rows, state) after each step, see
                llada_jax.samplers.text.generate_tokens.
            docs/sampling.md explains them all.

        Raises:
            UserError: a setting is out of range, or prompts is something else than texts.
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
            commit=commit,
            revise=revise,
            append=append,
            lookahead=lookahead,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
            suppress=suppress,
            cache=cache,
            refresh=refresh,
            on_step=on_step,
        )
        return [completion.text for completion in completions]

    @checked
    def complete(
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
        commit: str = SCHEDULE,
        revise: str = NONE,
        append: bool = False,
        lookahead: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: str = "free",
        suppress: Sequence[int] = (),
        cache: str = "none",
        refresh: int = 0,
        on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    ) -> list[Completion]:
        """Returns what `generate` does, with the tokens and the passes that each text needed.

        Args: see `generate`.

        Raises:
            UserError: a setting is out of range, or prompts is something else than texts.
        """
        prompts = list_of_texts(prompts, "generate")
        lengths = [len(self.tokenizer.encode(prompt)) + gen_length for prompt in prompts]
        shortest = min(lengths, default=0)
        hint = length_hint(self.record, gen_length=gen_length, shortest_row=shortest)
        self._warn_of_surprises(prompts, lengths, hint)
        settings: dict[str, Any] = dict(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            remasking=remasking,
            temperature=temperature,
            cfg_scale=cfg_scale,
            stop_at_eos=stop_at_eos,
            seed=seed,
            batch_size=batch_size,
            commit=commit,
            revise=revise,
            append=append,
            lookahead=lookahead,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
            suppress=suppress,
            cache=cache,
            refresh=refresh,
            on_step=on_step,
        )
        if self.record.mask.causal:
            return continue_text(
                self.model.cached_fn, self.params, self.tokenizer, prompts, **settings
            )
        return generate_text(
            self.model.logits_fn,
            self.params,
            self.tokenizer,
            prompts,
            cached_fn=self.model.cached_fn,
            shadow_fn=self.model.shadow_fn,
            **settings,
        )

    @checked
    def best_of(
        self,
        completions: Sequence[Completion],
        num: int,
        *,
        mc_samples: int = 32,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[Completion]:
        """Returns, of every `num` completions in a row, the one that the model finds most likely.

        Texts are compared by their log-likelihood per token, because by the sum of it the shortest
        would win, and under the same noise. An empty text has no likelihood and is the last choice.

        Args:
            completions: of `complete`, those of one prompt next to each other.
            mc_samples, seed, batch_size: of the estimate for masked diffusion, see `score`.
        """
        if num < 1 or len(completions) % num:
            raise UserError(
                f"num={num} must be at least 1 and divide the number of completions, "
                f"{len(completions)}."
            )
        encode = self.tokenizer.encode
        asked = [Question(encode(c.prompt), c.tokens) for c in completions if c.tokens]
        # Without the check of `score`: a text longer than the rows of training is sampled too.
        scores = self._scores(asked, num_samples=mc_samples, seed=seed, batch_size=batch_size)
        each = (score.log_likelihood / score.num_tokens for score in scores)
        per_token = [next(each) if c.tokens else -np.inf for c in completions]
        best = [
            first + int(np.argmax(per_token[first : first + num]))
            for first in range(0, len(completions), num)
        ]
        return [completions[number] for number in best]

    @checked
    def infill(
        self,
        texts: Sequence[str],
        *,
        steps: int | None = None,
        remasking: str = "low_confidence",
        commit: str = SCHEDULE,
        revise: str = NONE,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cfg_scale: float = 0.0,
        suppress: Sequence[int] = (),
        seed: int = 0,
        batch_size: int = 16,
        on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    ) -> list[str]:
        """Returns the texts with their gaps filled, such as "The [MASK:4] sat on the mat."

        Args:
            texts: a list of texts, each with at least one gap; see
                llada_jax.samplers.text.parse_gaps.
            steps: passes through the network; None fills one token per step.
            The others: see `generate`.

        Raises:
            UserError: a text has no gap, a setting is out of range, or the model is autoregressive.
        """
        texts = list_of_texts(texts, "infill")
        check_can_infill(self.record)
        self._warn_of_surprises([], [len(parse_gaps(self.tokenizer, text)[0]) for text in texts])
        completions = infill_text(
            self.model.logits_fn,
            self.params,
            self.tokenizer,
            texts,
            shadow_fn=self.model.shadow_fn,
            steps=steps,
            remasking=remasking,
            commit=commit,
            revise=revise,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cfg_scale=cfg_scale,
            suppress=suppress,
            seed=seed,
            batch_size=batch_size,
            on_step=on_step,
        )
        return [completion.text for completion in completions]

    @checked
    def generate_tokens(
        self,
        prompt_BT: ArrayLike | Sequence[Sequence[int]],
        *,
        gen_length: int = 64,
        block_length: int | None = None,
        steps: int | None = None,
        remasking: str = "low_confidence",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        eos_id: int | Sequence[int] | None = None,
        mask_id: int | None = None,
        pad_id: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        commit: str = SCHEDULE,
        revise: str = NONE,
        append: bool = False,
        lookahead: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        eos: str = "free",
        suppress: Sequence[int] = (),
        cache: str = "none",
        refresh: int = 0,
        on_step: Callable[[range, DenoiseStep], None] = ignore_step,
    ) -> np.ndarray:
        """Returns prompts and generations as ids, int32 [B, T + gen_length].

        Args:
            prompt_BT: ids of prompts of one length, int [B, T]; T may be 0.
            eos_id: a row that has generated this token is filled up with it, and sampling stops
                when all rows have. Of several ids (`tokenizer.end_ids`) each ends a row, and the
                first fills it. None, the default, generates all gen_length tokens.
            mask_id, pad_id: None takes the tokenizer's. A mask inside a prompt stays there.
            The others: see `generate`.

        Raises:
            UserError: the prompts have several lengths, an id has no row in the embedding, a
                setting is out of range, or the model is autoregressive.
        """
        if self.record.mask.causal:
            raise UserError(
                "generate_tokens denoises, and this model has never seen a mask; use generate."
            )
        check_token_rows(self.num_rows, "prompt_BT", prompt_BT)
        check_ids(self.num_rows, eos_id, mask_id, pad_id)
        prompt_BT = np.asarray(prompt_BT, np.int32)
        self._warn_of_surprises([], [prompt_BT.shape[1] + gen_length])
        generated_BT, _ = generate_tokens(
            self.model.logits_fn,
            self.params,
            prompt_BT.tolist(),
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
            cached_fn=self.model.cached_fn,
            shadow_fn=self.model.shadow_fn,
            seed=seed,
            batch_size=batch_size,
            commit=commit,
            revise=revise,
            append=append,
            lookahead=lookahead,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
            suppress=suppress,
            cache=cache,
            refresh=refresh,
            on_step=on_step,
        )
        return np.concatenate([prompt_BT, generated_BT], axis=1)

    @checked
    def score(
        self,
        pairs: Sequence[Question | tuple[str, str] | tuple[Sequence[int], Sequence[int]]],
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
                llada_jax.evaluation.answer_rows.Question, which may also hold what comes after.
            mc_samples: sets of masked tokens drawn for an answer. An answer that has no more of
                them, such as one of 7 tokens for 128, is scored without drawing.
            estimator: "exact_count", "uniform_time", or "confidence_order", which is not a bound;
                see llada_jax.evaluation.conditional.
            cfg_scale: strength of guidance towards the prompt; 0 switches it off.
            seed: of the noise. batch_size: rows in one pass.

        Raises:
            UserError: an answer is empty, an id has no row in the embedding, a pair is longer than
                the model's context, or a setting is out of range.
        """
        questions = [as_question(pair, self.tokenizer) for pair in pairs]
        check_questions(questions, num_rows=self.num_rows, longest=self.record.sequence_length)
        return self._scores(
            questions,
            num_samples=mc_samples,
            estimator=estimator,
            cfg_scale=cfg_scale,
            seed=seed,
            batch_size=batch_size,
        )

    def _scores(self, questions: Sequence[Question], **settings: Any) -> list[Score]:
        network: dict[str, Any] = dict(mask=self.record.mask, ids=self.tokenizer, mesh=self.mesh)
        return log_likelihoods(self.model, self.params, questions, **network, **settings)

    @checked
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
            window: tokens in one pass; None: a training row, which is also the maximum.
            context: tokens of a window that are only seen; None: half of it.
            The others: see `score`; mc_samples are drawn for each window.

        Raises:
            UserError: texts is a single text, one of them is empty, or a setting is out of range.
        """
        return bounds_of_texts(
            self.model,
            self.params,
            list_of_texts(texts, "score_text"),
            tokenizer=self.tokenizer,
            length=window_of(self.record, window),
            context=context,
            mask=self.record.mask,
            num_samples=mc_samples,
            estimator=estimator,
            seed=seed,
            batch_size=batch_size,
            mesh=self.mesh,
        )

    def _warn_of_surprises(
        self, prompts: Sequence[str], lengths: Sequence[int], hint: Sequence[str] = ()
    ) -> None:
        trained = self.record.sequence_length
        length = max(lengths, default=0)
        for sentence in (*surprises(prompts, length=length, trained=trained), *hint):
            # Of the caller, behind this function, the public one and its check of types.
            warnings.warn(sentence, stacklevel=4)


def _logits_impl(params, tokens_BT, segment_ids_BT, positions_BT, logits_fn):
    return logits_fn(params, tokens_BT, segment_ids_BT, positions_BT)


_logits = jax.jit(_logits_impl, static_argnames="logits_fn")
