"""A model for lm-evaluation-harness (EleutherAI, 0.4.13): likelihoods, rolling likelihoods and
generation, with the error of the Monte Carlo next to that of the sample.

The harness finds no plug-ins, so the model object is passed to `lm_eval.simple_evaluate`:

    import lm_eval
    import llada_jax
    from llada_jax.evaluation.harness import HarnessModel

    model = HarnessModel(llada_jax.load("runs/tiny/run"), mc_samples=128)
    results = lm_eval.simple_evaluate(model, tasks=["arc_challenge"])

`run` does that and adds the errors of the Monte Carlo.
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llada_jax.cluster.agreement import check_same_everywhere
from llada_jax.data.chat_template import environment, names_of
from llada_jax.errors import UserError, one_line, require
from llada_jax.evaluation.answer_rows import Question
from llada_jax.evaluation.conditional import Score, encode_pair, log_likelihoods
from llada_jax.evaluation.harness_hosts import cache_of_first
from llada_jax.evaluation.harness_tasks import (
    asking,
    check_sampling,
    load_tasks,
    monte_carlo_errors,
)
from llada_jax.evaluation.rolling import check_can_bound, windows
from llada_jax.samplers.autoregressive import continue_tokens
from llada_jax.samplers.commit import SCHEDULE
from llada_jax.samplers.denoise import DenoiseStep
from llada_jax.samplers.revise import NONE
from llada_jax.samplers.text import (
    cut_at_end,
    decode_after,
    generate_tokens,
    without_denoising,
)

# Requests after which results are written to the cache of the harness, from which an interrupted
# evaluation continues.
CACHED_TOGETHER = 256

# What tasks call the most tokens of a text; the harness reads the first that is given.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel:
    """Answers the requests of the harness with a loaded model.

    It registers as a subclass of lm_eval.api.model.LM and does not inherit from it, so that this
    module can be imported without the harness.

    The processes of a run answer each request together, its rows split over the mesh of the model,
    and all of them have every result. To the harness each is therefore the only one: a rank would
    give every process other requests, and none would come to the collectives of another's.

    Args:
        pretrained: what llada_jax.load returns.
        mc_samples, estimator, cfg_scale, seed: see llada_jax.evaluation.conditional.
        batch_size: rows in one pass.
        gen_length, block_length, steps: of generated texts; None: as many tokens as the task asks
            for (LENGTHS, 256 if it says nothing), in one block, one token per step.
        remasking, commit, revise, append, lookahead, eos, suppress, cache, refresh, top_k, top_p:
            of generated texts, see llada_jax.loaded_model.Pretrained.generate. The temperature is
            that of a task that samples, and 0 otherwise.
        chat_template: Jinja source; None takes that of the checkpoint.

    Raises:
        UserError: a setting is unknown or out of range, does not fit another one or the rows of the
            model, or is about denoising, and the model is autoregressive.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        mc_samples: int = 128,
        estimator: str = "exact_count",
        cfg_scale: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
        gen_length: int | None = None,
        block_length: int | None = None,
        steps: int | None = None,
        remasking: str = "low_confidence",
        commit: str = SCHEDULE,
        revise: str = NONE,
        append: bool = False,
        lookahead: int | None = None,
        eos: str = "free",
        suppress: Sequence[int] = (),
        cache: str = "none",
        refresh: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        chat_template: str | None = None,
    ):
        api = require("lm_eval.api.model", extra="eval")
        # the harness checks that the model is an instance of its own class
        api.LM.register(HarnessModel)
        self.rank, self.world_size, self.device = 0, 1, None
        self.cache_hook = api.CacheHook(None)
        self.pretrained, self.tokenizer = pretrained, pretrained.tokenizer
        self.mask = pretrained.record.mask
        self.longest = pretrained.record.sequence_length
        self.scoring: dict[str, Any] = dict(
            num_samples=mc_samples, estimator=estimator, cfg_scale=cfg_scale, seed=seed
        )
        self.estimator = estimator
        self.batch_size, self.seed = batch_size, seed
        self.gen_length = gen_length
        self.sampling: dict[str, Any] = dict(
            block_length=block_length,
            steps=steps,
            remasking=remasking,
            commit=commit,
            revise=revise,
            append=append,
            lookahead=lookahead,
            eos=eos,
            suppress=suppress,
            cache=cache,
            refresh=refresh,
            top_k=top_k,
            top_p=top_p,
            cfg_scale=cfg_scale,
        )
        if self.mask.causal:
            self.sampling = without_denoising(self.sampling)
        check_sampling(gen_length=gen_length, **self.sampling)
        if gen_length is not None:
            self._room_of_prompt(gen_length)
        found = pretrained.record.chat_template
        self.template = found if chat_template is None else chat_template
        self.writes_chats = False
        # what the Monte Carlo adds to each answer, by its request
        self.standard_errors: dict[tuple, float] = {}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; in one that a chat template wrote, special tokens are
        themselves.

        A tokenizer reads them as ordinary letters, because texts may not contain special tokens.
        """
        special = self.tokenizer.markers if self.writes_chats else {}
        if not special:
            return self.tokenizer.encode(text)
        longest_first = sorted(special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = [
            token
            for part in parts
            for token in ([special[part]] if part in special else self.tokenizer.encode(part))
        ]
        # An autoregressive model is given BOS in front of every row, and some templates write it.
        begins = self.mask.causal and ids[:1] == [self.tokenizer.bos_id]
        return ids[1:] if begins else ids

    def identity(self) -> str:
        """Returns a digest of all that an answer follows from, apart from its request and the
        rounding of a batch.
        """
        known = (
            self.pretrained.checksums,
            self.pretrained.record.architecture,
            self.pretrained.model.settings["dtype"],
            self.mask,
            self.tokenizer.fingerprint,
            self.longest,
            self.template,
            self.scoring,
            self.gen_length,
            self.sampling,
        )
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes what writes results to the harness's cache."""
        self.cache_hook = cache_hook

    # ---- likelihoods

    def _scores(self, questions: Sequence[Question]) -> list[Score]:
        return log_likelihoods(
            self.pretrained.model,
            self.pretrained.params,
            questions,
            mask=self.mask,
            ids=self.tokenizer,
            batch_size=self.batch_size,
            mesh=self.pretrained.mesh,
            **self.scoring,
        )

    def _shortened(self, question: Question) -> Question:
        """Without the oldest tokens of the prompt that do not fit the context of the model."""
        room = self.longest - len(question.answer)
        if room < 0:
            raise UserError(
                f"An answer of the task has {len(question.answer)} tokens, and the model was "
                f"trained on rows of {self.longest}; leave this task out."
            )
        return question._replace(before=question.before[max(0, len(question.before) - room) :])

    def _in_parts(self, method: str, requests: Sequence[Any], answer_part):
        """Answers requests part by part, so that the cache of the harness has what is done.

        Raises:
            UserError: the processes of the run are asked for different things.
        """
        self.is_asked = True
        # Processes that are asked for different things would wait for each other forever.
        asked = repr([request.args for request in requests])
        check_same_everywhere({f"what the harness asks for ({method})": asked})
        results = []
        for first in range(0, len(requests), CACHED_TOGETHER):
            part = requests[first : first + CACHED_TOGETHER]
            for request, result in zip(part, answer_part([r.args for r in part]), strict=True):
                self.cache_hook.add_partial(method, request.args, result)
                results.append(result)
        return results

    def loglikelihood(self, requests):
        """Returns (log-likelihood, whether greedy decoding would give the answer) of each request.

        The second is False for masked diffusion, for which it would take a pass per token and
        depends on the order of decoding; the published evaluation leaves it out as well.
        """

        def answer_part(arguments):
            questions = [
                self._shortened(encode_pair(self, context, continuation))
                for context, continuation in arguments
            ]
            found = []
            for key, score in zip(arguments, self._scores(questions), strict=True):
                self.standard_errors[key] = score.standard_error
                found.append((score.log_likelihood, bool(score.is_most_likely)))
            return found

        return self._in_parts("loglikelihood", requests, answer_part)

    def loglikelihood_rolling(self, requests):
        """Returns the log-likelihood of each whole text, by windows of the model's length of which
        half is context.
        """

        def answer_part(arguments):
            check_can_bound(self.estimator)
            cut = [
                windows(self.encode(text), length=self.longest, context=self.longest // 2)
                for (text,) in arguments
            ]
            scores = iter(self._scores([question for questions in cut for question in questions]))
            found = []
            for key, questions in zip(arguments, cut, strict=True):
                mine = [next(scores) for _ in questions]
                self.standard_errors[key] = float(
                    np.sqrt(sum(score.standard_error**2 for score in mine))
                )
                found.append(sum(score.log_likelihood for score in mine))
            return found

        return self._in_parts("loglikelihood_rolling", requests, answer_part)

    # ---- generation

    def generate_until(self, requests):
        """Returns the text after each prompt, up to the first of the task's stop strings.

        With blocks, a text of masked diffusion takes no further pass once it has one, EOS or the
        end of a turn in a finished block. An autoregressive model writes token by token.
        """
        noise_numbers = iter(_noise_numbers(requests))

        def answer_part(arguments):
            return self._generate_part(arguments, [next(noise_numbers) for _ in arguments])

        return self._in_parts("generate_until", requests, answer_part)

    def _generate_part(self, arguments, noise_numbers):
        by_settings: dict[tuple, list[int]] = {}
        for number, (_, settings) in enumerate(arguments):
            by_settings.setdefault(_generation(settings), []).append(number)
        found: dict[int, str] = {}
        for (until, most, temperature), numbers in by_settings.items():
            # prompts of similar length share a batch
            numbers.sort(key=lambda number: len(arguments[number][0]))
            texts = self._generate(
                [arguments[number][0] for number in numbers],
                until,
                gen_length=self.gen_length or most,
                temperature=temperature,
                noise_numbers=[noise_numbers[number] for number in numbers],
            )
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(arguments))]

    def _generate(
        self,
        prompts: Sequence[str],
        until: Sequence[str],
        *,
        gen_length: int,
        temperature: float,
        noise_numbers: Sequence[int],
    ) -> list[str]:
        """Returns the text after each prompt, up to the first stop string."""
        room = self._room_of_prompt(gen_length)
        ids = [self.encode(prompt) for prompt in prompts]
        ids = [row[max(0, len(row) - room) :] for row in ids]
        request: dict[str, Any] = dict(
            mask_id=self.tokenizer.mask_id,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.tokenizer.end_ids,
            num_ids=self.tokenizer.vocab_size,
            gen_length=gen_length,
            temperature=temperature,
            noise_numbers=noise_numbers,
            seed=self.seed,
            batch_size=self.batch_size,
            **self.sampling,
        )
        model, params = self.pretrained.model, self.pretrained.params
        if self.mask.causal:
            tokens_BT, _ = continue_tokens(
                model.cached_fn, params, ids, bos_id=self.tokenizer.bos_id, **request
            )
        else:
            tokens_BT, _ = generate_tokens(
                model.logits_fn,
                params,
                ids,
                cached_fn=model.cached_fn,
                shadow_fn=model.shadow_fn,
                is_enough=self._have_ended(ids, until, gen_length=gen_length),
                **request,
            )
        return [
            self._until(before, tokens, until)[0]
            for before, tokens in zip(ids, tokens_BT.tolist(), strict=True)
        ]

    def _room_of_prompt(self, gen_length: int) -> int:
        """Returns how many tokens the rows of the model have for a prompt."""
        room = self.longest - gen_length
        if room < 0:
            raise UserError(
                f"gen_length={gen_length} is longer than the rows of {self.longest} tokens that "
                "the model was trained on; set a smaller one."
            )
        return room

    def _have_ended(
        self, ids: Sequence[Sequence[int]], until: Sequence[str], *, gen_length: int
    ) -> Callable[[Sequence[int], DenoiseStep], list[bool]]:
        """Returns a function that says which texts of a batch have an end in the blocks that are
        finished.
        """
        block_length = self.sampling["block_length"] or gen_length

        def have_ended(rows: Sequence[int], state: DenoiseStep) -> list[bool]:
            finished_BT = jax.device_get(state.canvas_BT)[: len(rows), -gen_length:]
            finished_BT = finished_BT[:, : state.block * block_length]
            return [
                self._until(ids[row], tokens.tolist(), until)[1]
                for row, tokens in zip(rows, finished_BT, strict=True)
            ]

        return have_ended

    def _until(
        self, before: Sequence[int], tokens: Sequence[int], until: Sequence[str]
    ) -> tuple[str, bool]:
        """Returns the text of generated tokens up to its end, and whether it has one."""
        kept = cut_at_end(tokens, self.tokenizer.end_ids)
        text = decode_after(self.tokenizer, before, kept)
        ends = [at for at in map(text.find, until) if at >= 0]
        return (text[: min(ends)] if ends else text), bool(ends) or len(kept) < len(tokens)

    # ---- chat

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return self.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the Jinja source with which chats are written."""
        return self.template or ""

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """Returns a chat as one text, as transformers writes it.

        Raises:
            UserError: the checkpoint has no chat template.
        """
        if not self.template:
            raise UserError(
                "The checkpoint has no chat template; pass HarnessModel(chat_template=...), or "
                "evaluate without one."
            )
        made = environment()
        self.writes_chats = True
        known = names_of(self.tokenizer) | {"add_generation_prompt": add_generation_prompt}
        try:
            return made.from_string(self.template).render(messages=chat_history, **known)
        except Exception as error:
            # as in chat_template.Chat.render
            raise UserError(
                f"The chat template fails ({one_line(str(error))}); pass another one with "
                "HarnessModel(chat_template=...)."
            ) from error


def _generation(settings: dict) -> tuple[tuple[str, ...], int, float]:
    """Returns the stop strings, the most tokens and the temperature of a task's gen_kwargs, which
    are read as lm_eval.models.utils.normalize_gen_kwargs reads them.
    """
    until = settings.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    temperature = 0.0 if settings.get("do_sample") is False else settings.get("temperature")
    most = next((settings[name] for name in LENGTHS if settings.get(name) is not None), 256)
    return tuple(stop for stop in until if stop), int(most), float(temperature or 0.0)


def _noise_numbers(requests: Sequence[Any]) -> list[int]:
    """Returns the number of each request by which its noise is drawn, 31 bits.

    It follows from what is asked, so that neither `limit` nor other requests change a text, and
    from how often that was asked before, so that the repeats of a question differ.
    """
    times: Counter = Counter()
    found = []
    for request in requests:
        asked = repr((request.task_name, request.doc_id, request.args[0]))
        found.append(zlib.crc32(f"{asked} {times[asked]}".encode()) >> 1)
        times[asked] += 1
    return found


def run(
    model: HarnessModel,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    use_cache: str | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    bootstrap_iters: int = 100_000,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Returns what lm_eval.simple_evaluate returns, with `METRIC_mc_stderr,FILTER` next to each
    `METRIC_stderr,FILTER` of tasks that read likelihoods.

    Where `stderr` is the error due to the sample of questions, `mc_stderr` is what the Monte Carlo
    adds to it: the scores are perturbed with independent normal errors of their own size, and the
    metric is computed again; the spread of the results is reported. Errors of the answers to one
    question are positively correlated, because they share their noise, so that it is an upper bound
    for metrics that compare answers. It is nan where a score has no error: one that comes from the
    cache, or that was drawn once.

    Args:
        use_cache: where results are kept, as the beginning of the name of a file. The name goes on
            with the model's `identity`, because the harness finds a result by its request alone.
        tasks, include_path, confirm_run_unsafe_code: see
            llada_jax.evaluation.harness_tasks.load_tasks.
        The others: see lm_eval.simple_evaluate.

    Raises:
        UserError: a task cannot be loaded or asked, or runs code without confirmation.
    """
    lm_eval = require("lm_eval", extra="eval")
    loaded = load_tasks(
        tasks, include_path=include_path, confirm_run_unsafe_code=confirm_run_unsafe_code
    )
    roots = [root for objects in loaded for root in objects]
    manager = require("lm_eval.tasks", extra="eval").TaskManager(include_defaults=False)
    cache_name = use_cache and f"{use_cache}_{model.identity()}"
    with asking(model, roots), cache_of_first(cache_name) as cache:
        results = lm_eval.simple_evaluate(
            model,
            tasks=roots,
            task_manager=manager,
            log_samples=True,
            num_fewshot=num_fewshot,
            limit=limit,
            use_cache=cache,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            bootstrap_iters=bootstrap_iters,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    by_name = manager.load(roots)["tasks"]
    for name, samples in results["samples"].items():
        task = by_name[name]
        if task.OUTPUT_TYPE == "generate_until":
            continue
        errors = monte_carlo_errors(task, samples, model.standard_errors)
        for (metric, filtered), error in errors.items():
            results["results"][name][f"{metric}_mc_stderr,{filtered}"] = error
    return results
