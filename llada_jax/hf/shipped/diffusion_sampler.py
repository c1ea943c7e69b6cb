"""The sampler of the masked diffusion language models of this directory: masks become tokens, some
in every pass of the network, block after block.

Needs PyTorch only. Names carry shapes: B rows, T positions of the block, V vocabulary. No row sees
another. The method is that of LLaDA (arXiv 2502.09992, algorithms 4 and 5); the sources of the
other rules stand next to them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- which tokens come first: a confidence for every position, the greatest first


def low_confidence(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """The probability of the chosen token: the least certain positions stay masked (LLaDA,
    algorithm 5).
    """
    return logits_BTV.softmax(-1).gather(-1, choices_BT[..., None])[..., 0]


def random_order(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """A uniform draw: positions are revealed in random order (LLaDA, algorithm 4)."""
    return torch.rand(choices_BT.shape, generator=generator, device=choices_BT.device)


def entropies(logits_BTV: Tensor) -> Tensor:
    """Returns the entropy of softmax(logits) in nats; logits may be -inf."""
    return torch.special.entr(logits_BTV.softmax(-1)).sum(-1)


def low_entropy(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """Positions where few tokens are possible come first."""
    return -entropies(logits_BTV)


def margin(logits_BTV: Tensor, choices_BT: Tensor, generator) -> Tensor:
    """The probability of the most likely token less that of the second (arXiv 2502.06768)."""
    first_BT, second_BT = logits_BTV.softmax(-1).topk(2).values.unbind(-1)
    return first_BT - second_BT


REMASKING = {
    "low_confidence": low_confidence,
    "random": random_order,
    "entropy": low_entropy,
    "margin": margin,
}

# ---- how many tokens a pass keeps. Rules see the hidden positions sorted, the surest first: c are
# the probabilities of the proposals, h the entropies in nats. They return, for n = 1, 2, ... in a
# row, whether the first n may be kept.


def threshold(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """c(n) > amount (Fast-dLLM, arXiv 2505.22618)."""
    return c_BT > amount


def factor(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """(n + 1)(1 - c(n)) < amount (Fast-dLLM)."""
    n_T = torch.arange(1, c_BT.shape[1] + 1, device=c_BT.device)
    return (n_T + 1) * (1 - c_BT) < amount


def frechet(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """max(0, c(1) + ... + c(n) - (n - 1)) - (1 - c(n)) > amount (arXiv 2606.02955), from sums of
    doubts: those of probabilities would round them away.
    """
    doubt_BT = 1 - c_BT
    return (1 - doubt_BT.cumsum(1)).clamp(min=0) - doubt_BT > amount


def entropy(c_BT: Tensor, h_BT: Tensor, amount: float) -> Tensor:
    """The entropies of the first n, without the largest of them, sum to no more than the amount
    (arXiv 2505.24857).
    """
    return F.pad(h_BT[:, :-1], (1, 0)).cumsum(1) <= amount


SCHEDULE = "schedule"
# name -> what it asks, its usual amount, and the greatest that there can be
COMMIT = {
    "threshold": (threshold, 0.9, 1.0),
    "factor": (factor, 1.0, 1e6),
    "frechet": (frechet, 0.25, 1.0),
    "entropy": (entropy, 0.1, 1e6),
}
EOS = ("free", "never", "last")
CACHES = ("none", "prefix", "dual")


def parse_commit(text: str) -> tuple[str, float]:
    """Returns the rule that NAME or NAME=AMOUNT names, and its amount; ValueError for others."""
    name, equals, amount = text.partition("=")
    if text == SCHEDULE:
        return SCHEDULE, 0.0
    if name not in COMMIT:
        names = ", ".join([SCHEDULE, *COMMIT])
        raise ValueError(f"commit={text!r} is unknown; use one of {names}, as NAME or NAME=AMOUNT.")
    _, default, greatest = COMMIT[name]
    try:
        number = float(amount) if equals else default
    except ValueError:
        number = float("nan")
    if not 0 <= number <= greatest:
        raise ValueError(
            f"commit={text!r}: the amount of {name} must be a number between 0 and {greatest:g}; "
            f"the usual one is {name}={default:g}."
        )
    return name, number


def count_sure(
    name: str, amount: float, c_BT: Tensor, h_BT: Tensor, is_hidden_BT: Tensor
) -> Tensor:
    """Returns how many tokens a rule keeps in each row, [B, 1]; 0 where none is sure."""
    c_BT = c_BT.masked_fill(~is_hidden_BT, -torch.inf).sort(1, descending=True).values
    h_BT = h_BT.masked_fill(~is_hidden_BT, torch.inf).sort(1).values
    n_T = torch.arange(1, c_BT.shape[1] + 1, device=c_BT.device)
    holds_BT = COMMIT[name][0](c_BT, h_BT, amount) & (n_T <= is_hidden_BT.sum(1, keepdim=True))
    return (n_T * holds_BT).amax(1, keepdim=True)


def pick_tokens(logits_BTV: Tensor, temperature: float, generator) -> Tensor:
    """Draws from softmax(logits / temperature) by the Gumbel-max trick; the most likely token at
    temperature 0.

    Float64, because the tail of a float32 draw is too short for a large vocabulary (arXiv
    2409.02908).
    """
    if temperature > 0:
        noise_BTV = (
            torch.empty_like(logits_BTV, dtype=torch.float64)
            .exponential_(generator=generator)
            .log()
        )
        logits_BTV = logits_BTV - temperature * noise_BTV
    return logits_BTV.argmax(-1)


class KeysValues:
    """Rotated keys and values of one layer. The first pass computes those of the whole canvas, and
    later passes only those of a window of columns that begins at `start`; these read the others
    here.
    """

    def __init__(self, start: int):
        self.start = start
        self.kept = None

    def joined(self, k_BNWH: Tensor, v_BNWH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of all columns."""
        if self.kept is None:
            self.kept = k_BNWH, v_BNWH
            return self.kept
        stop = self.start + k_BNWH.shape[2]
        k_BNSH, v_BNSH = (
            torch.cat([old[:, :, : self.start], new, old[:, :, stop:]], dim=2)
            for old, new in zip(self.kept, (k_BNWH, v_BNWH))
        )
        return k_BNSH, v_BNSH


def check_request(
    gen_length, block_length, steps, temperature, cfg_scale, remasking, commit, eos, cache, refresh
) -> None:
    """Raises ValueError unless the blocks tile the generation, the steps divide evenly among the
    blocks, and all options are known and go together.
    """
    if min(gen_length, block_length, steps) < 1:
        raise ValueError(
            f"gen_length={gen_length}, block_length={block_length} and steps={steps} must be at "
            "least 1."
        )
    if gen_length % block_length:
        raise ValueError(f"block_length={block_length} must divide gen_length={gen_length}.")
    num_blocks = gen_length // block_length
    if steps % num_blocks or steps > gen_length:
        raise ValueError(
            f"steps={steps} must be a multiple of the number of blocks, gen_length/block_length = "
            f"{num_blocks}, and at most gen_length={gen_length}."
        )
    if not (0 <= temperature < float("inf") and 0 <= cfg_scale < float("inf")):
        raise ValueError(
            f"temperature={temperature} and cfg_scale={cfg_scale} must be finite and not negative."
        )
    options = (("remasking", remasking, REMASKING), ("eos", eos, EOS), ("cache", cache, CACHES))
    for name, value, known in options:
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}.")
    if parse_commit(commit)[0] != SCHEDULE and remasking != "low_confidence":
        raise ValueError(
            f"commit={commit} keeps the surest tokens, and remasking={remasking} names another "
            f"order; leave remasking out, or use commit={SCHEDULE}."
        )
    if refresh < 0 or (refresh and cache == "none"):
        raise ValueError(
            f"refresh={refresh} with cache={cache} must not be negative and needs cache='prefix' "
            "or 'dual'; 0 fills the cache once per block, and 1 in every pass."
        )


class DiffusionSampler:
    """The sampler as a method: for a class that computes logits as MaskedDiffusionLM does."""

    @torch.no_grad()
    def generate_diffusion(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        gen_length: int = 128,
        block_length: int | None = None,
        steps: int | None = None,
        temperature: float = 0.0,
        remasking: str = "low_confidence",
        commit: str = SCHEDULE,
        cfg_scale: float = 0.0,
        append: bool = False,
        eos: str = "free",
        stop_at_eos: bool = False,
        cache: str = "none",
        refresh: int = 0,
        streamer=None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The reverse process: `gen_length` masks behind each prompt become tokens, block after
        block.

        What was revealed is never revised, and the mask token is never chosen.

        Args:
            input_ids: [B, P] prompts; shorter ones are padded, best on the left.
            attention_mask: [B, P], zero at padding.
            gen_length: number of tokens to generate.
            block_length: blocks are finished from left to right; gen_length unless given (pure
                diffusion).
            steps: forward passes in total, the most that there can be; one per token unless given.
            temperature: 0 takes the most likely token, 1 samples the distribution of the model.
            remasking: which proposals the schedule keeps: "low_confidence" (the surest), "random",
                "entropy" or "margin".
            commit: how many proposals a pass keeps: "schedule" (an equal share), or at least that
                and as many as "threshold", "factor", "frechet" or "entropy" finds sure; with an
                amount as in "threshold=0.9".
            cfg_scale: strength w of classifier-free guidance, un + (w + 1) (l - un), where `un`
                sees the prompt masked; 0 switches it off, anything else runs on twice the batch.
            append: the network does not see the blocks behind the current one.
            eos: what becomes of the end-of-text token: "free" (as any other), "never" (not
                proposed) or "last" (it, or the end of a turn, is revealed after all others).
            stop_at_eos: a finished block that contains eos_token_id or eot_token_id of the config
                ends its row: EOS fills the rest. Off, as published, exactly gen_length tokens are
                generated.
            cache: "prefix" keeps the keys and values of all that stands before the current block,
                "dual" also of what stands behind it: faster, and an approximation.
            refresh: the cache is filled by the first pass of every block, and by every N-th one for
                refresh=N; 1 is exact.
            streamer: gets the prompt and every finished block by `put`, and after every pass the
                current block, with proposals where it is still hidden, by `put_draft` if it has
                that: transformers' TextDiffusionStreamer.
            generator: makes temperature > 0 and "random" reproducible; on the device of the model.

        Returns:
            [B, P + gen_length]: prompts and generations.

        Raises:
            ValueError: block_length does not divide gen_length, the number of blocks does not
                divide steps, or an option is unknown, out of range or without effect.
        """
        block_length = gen_length if block_length is None else block_length
        steps = gen_length if steps is None else steps
        check_request(
            gen_length,
            block_length,
            steps,
            temperature,
            cfg_scale,
            remasking,
            commit,
            eos,
            cache,
            refresh,
        )
        if cache != "none" and getattr(self.config, "output_shift", False):
            raise ValueError(
                "This network scores a token at the position before it (output_shift), for which "
                "there is no cache; use cache='none'."
            )
        rule, amount = parse_commit(commit)
        B, P = input_ids.shape
        T = P + gen_length
        mask_id = self.config.mask_token_id
        end_ids = end_ids_of(self.config)
        steps_per_block = steps * block_length // gen_length

        canvas_BT = F.pad(input_ids, (0, gen_length), value=mask_id)
        is_real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_real_BT = F.pad((is_real_BT != 0).long(), (0, gen_length), value=1)
        # a row computes what it computes without padding
        positions_BT = (is_real_BT.cumsum(1) - 1).clamp(min=0)
        if streamer is not None:
            streamer.put(input_ids.cpu())

        def block_logits(start: int, seen: int, kept: list[KeysValues] | None) -> Tensor:
            """Returns the logits of the current block: from the canvas, or with what is kept from
            a window of it alone.
            """
            tokens_BT = canvas_BT[:, :seen]
            if cfg_scale > 0:
                unprompted_BT = tokens_BT.clone()
                unprompted_BT[:, :P] = mask_id
                tokens_BT = torch.cat([tokens_BT, unprompted_BT])
            first, stop = 0, seen
            if kept is not None and kept[0].kept is not None:
                first, stop = start, seen if cache == "prefix" else start + block_length
            repeats = len(tokens_BT) // B
            logits_BTV = self(
                tokens_BT[:, first:stop],
                attention_mask=is_real_BT[:, :seen].repeat(repeats, 1),
                position_ids=positions_BT[:, first:stop].repeat(repeats, 1),
                columns=slice(start - first, start - first + block_length),
                cache=kept,
            ).logits.float()
            if cfg_scale > 0:
                logits_BTV, unprompted_BTV = logits_BTV.chunk(2)
                logits_BTV = unprompted_BTV + (cfg_scale + 1) * (logits_BTV - unprompted_BTV)
            if eos == "never":  # the end of a turn still ends a text
                logits_BTV[..., end_ids[0]] = -torch.inf
            return logits_BTV

        for start in range(P, T, block_length):
            block = slice(start, start + block_length)
            kept = None
            for step in range(steps_per_block):
                is_hidden_BT = canvas_BT[:, block] == mask_id
                # the schedule has tokens left for every step: do not wait for the device to say so
                if rule != SCHEDULE and not is_hidden_BT.any():
                    break
                # 1. the network; only the current block is read
                if cache != "none" and (step % refresh == 0 if refresh else step == 0):
                    kept = [KeysValues(start) for _ in range(self.config.num_hidden_layers)]
                logits_BTV = block_logits(start, block.stop if append else T, kept)
                # 2. a proposal for every hidden position, and the confidence in it
                choosable_BTV = logits_BTV.clone()
                choosable_BTV[..., mask_id] = -torch.inf
                choices_BT = pick_tokens(choosable_BTV, temperature, generator)
                order = "entropy" if rule == "entropy" else remasking
                order_BT = REMASKING[order](logits_BTV, choices_BT, generator)
                is_last_BT = torch.zeros_like(is_hidden_BT)
                if eos == "last":
                    is_last_BT = is_among(choices_BT, end_ids)
                    order_BT = order_BT.masked_fill(is_last_BT, torch.finfo(order_BT.dtype).min)
                order_BT = order_BT.masked_fill(~is_hidden_BT, -torch.inf)
                # 3. how many are revealed: an equal share in every step that is left, rounded up,
                # or more where the rule is sure of more
                count_B1 = -(-is_hidden_BT.sum(1, keepdim=True) // (steps_per_block - step))
                if rule != SCHEDULE:
                    c_BT = low_confidence(logits_BTV, choices_BT, generator)
                    h_BT = entropies(logits_BTV) if rule == "entropy" else torch.zeros_like(c_BT)
                    sure_B1 = count_sure(rule, amount, c_BT, h_BT, is_hidden_BT & ~is_last_BT)
                    count_B1 = torch.maximum(count_B1, sure_B1)
                rank_BT = order_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                is_revealed_BT = is_hidden_BT & (rank_BT < count_B1)
                if hasattr(streamer, "put_draft"):
                    draft_BT = torch.where(is_hidden_BT, choices_BT, canvas_BT[:, block])
                    streamer.put_draft(draft_BT.cpu())
                canvas_BT[:, block] = torch.where(is_revealed_BT, choices_BT, canvas_BT[:, block])
            if stop_at_eos:
                generated_BT = canvas_BT[:, P:]
                is_end_BT = is_among(generated_BT, end_ids)
                is_after_BT = is_end_BT.cumsum(1) > is_end_BT.long()
                canvas_BT[:, P:] = generated_BT.masked_fill(is_after_BT, end_ids[0])
            if streamer is not None:
                streamer.put(canvas_BT[:, block].cpu())
            if stop_at_eos and not (canvas_BT[:, P:] == mask_id).any():
                break
        if streamer is not None:
            streamer.end()
        return canvas_BT


def end_ids_of(config) -> list[int]:
    """Returns what ends a text: EOS first, then the end of a turn where the config names one."""
    ids = [config.eos_token_id, getattr(config, "eot_token_id", None)]
    ids = ids[0] + ids[1:] if isinstance(ids[0], list) else ids
    return [i for i in ids if i is not None]


def is_among(tokens_BT: Tensor, ids: list[int]) -> Tensor:
    return torch.isin(tokens_BT, torch.tensor(ids, device=tokens_BT.device))
