"""The sampler of the masked diffusion language models of this directory: masks become tokens, some
in every pass of the network, block after block. Its rules are in diffusion_rules.py.

Needs PyTorch only. Names carry shapes: B rows, T positions of the block, V vocabulary. No row sees
another. The method is that of LLaDA (arXiv 2502.09992, algorithms 4 and 5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .diffusion_rules import (
    CACHES,
    EOS,
    LOOP,
    NONE,
    REMASKING,
    SCHEDULE,
    WINO,
    count_sure,
    entropies,
    is_among,
    loop_count,
    low_confidence,
    most_drafted,
    parse_commit,
    parse_revise,
    pick_tokens,
    ranks,
    taken_back_by_chance,
    taken_back_by_shadow,
)


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
    gen_length,
    block_length,
    steps,
    temperature,
    top_k,
    top_p,
    cfg_scale,
    remasking,
    commit,
    revise,
    eos,
    cache,
    refresh,
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
    if not (0 <= temperature <= 1e6 and 0 <= cfg_scale <= 1e6):
        raise ValueError(
            f"temperature={temperature} and cfg_scale={cfg_scale} must be numbers from 0 to 1e6."
        )
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k={top_k} must not be negative, and top_p={top_p} must be greater than 0 and at "
            "most 1; 0 and 1 keep every token."
        )
    if temperature == 0 and (top_k or top_p < 1):
        raise ValueError(
            f"top_k={top_k} and top_p={top_p} restrict what is drawn, and temperature=0 draws "
            "nothing; set a temperature, or leave them out."
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
    reviser = parse_revise(revise)[0]
    if reviser == LOOP and parse_commit(commit)[0] != SCHEDULE:
        raise ValueError(
            f"revise={revise} has a schedule of its own, and commit={commit} goes ahead of it; "
            "leave one of them out, or use revise='remdm-cap'."
        )
    if reviser == WINO and cache != "none":
        raise ValueError(
            f"revise={revise} reads the block and its shadow in one pass over the whole canvas, "
            f"without a cache; leave cache={cache} out, or use another rule that revises."
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
        top_k: int = 0,
        top_p: float = 1.0,
        remasking: str = "low_confidence",
        commit: str = SCHEDULE,
        revise: str = NONE,
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

        What was revealed stays unless `revise` takes it back, and the mask token is never chosen.

        Args:
            input_ids: [B, P] prompts; shorter ones are padded, best on the left.
            attention_mask: [B, P], zero at padding.
            gen_length: number of tokens to generate.
            block_length: blocks are finished from left to right; gen_length unless given (pure
                diffusion).
            steps: forward passes in total, the most that there can be; one per token unless given.
            temperature: 0 takes the most likely token, 1 samples the distribution of the model.
            top_k, top_p: draw among the `top_k` most likely tokens alone, and among the most likely
                ones that have a probability of `top_p` together; 0 and 1 keep every token.
            remasking: which proposals the schedule keeps: "low_confidence" (the surest), "random",
                "entropy" or "margin".
            commit: how many proposals a pass keeps: "schedule" (an equal share), or at least that
                and as many as "threshold", "factor", "frechet" or "entropy" finds sure; with an
                amount as in "threshold=0.9".
            revise: which tokens of the current block are masked again: "none", "remdm-cap",
                "remdm-rescale" or "remdm-loop" (at random, so that later steps reconsider them), or
                "wino" (what the network doubts once it is masked; with a commit rule); with an
                amount as in "remdm-cap=0.01".
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
            top_k,
            top_p,
            cfg_scale,
            remasking,
            commit,
            revise,
            eos,
            cache,
            refresh,
        )
        rule, amount = parse_commit(commit)
        reviser, revise_amount = parse_revise(revise)
        if getattr(self.config, "output_shift", False) and (cache != "none" or reviser == WINO):
            raise ValueError(
                "This network scores a token at the position before it (output_shift), for which "
                "there is neither a cache nor a shadow of a block; use cache='none', and another "
                "rule than revise='wino'."
            )
        B, P = input_ids.shape
        T = P + gen_length
        mask_id = self.config.mask_token_id
        num_ids = getattr(self.config, "unpadded_vocab_size", None) or self.config.vocab_size
        end_ids = end_ids_of(self.config)
        if not end_ids and (eos != "free" or stop_at_eos):
            raise ValueError(
                f"eos={eos!r} with stop_at_eos={stop_at_eos} needs the id that ends a text, and "
                "config.eos_token_id is None; set it, or leave both arguments out."
            )
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
            a window of it alone. For WINO those of its shadow follow.
            """
            tokens_BT, is_there_BT, place_BT = (
                array[:, :seen] for array in (canvas_BT, is_real_BT, positions_BT)
            )
            columns = start + torch.arange(block_length, device=canvas_BT.device)
            shadow = None
            if reviser == WINO:
                shadow = columns
                tokens_BT = F.pad(tokens_BT, (0, block_length), value=mask_id)
                is_there_BT = F.pad(is_there_BT, (0, block_length), value=1)
                place_BT = torch.cat([place_BT, place_BT[:, columns]], dim=1)
                columns = torch.cat([columns, columns - start + seen])
            if cfg_scale > 0:
                unprompted_BT = tokens_BT.clone()
                unprompted_BT[:, :P] = mask_id
                tokens_BT = torch.cat([tokens_BT, unprompted_BT])
            window = slice(None)
            if kept is not None and kept[0].kept is not None:
                window = slice(start, seen if cache == "prefix" else start + block_length)
                columns = columns - start
            repeats = len(tokens_BT) // B
            logits_BTV = self(
                tokens_BT[:, window],
                attention_mask=is_there_BT.repeat(repeats, 1),
                position_ids=place_BT[:, window].repeat(repeats, 1),
                columns=columns,
                cache=kept,
                shadow=shadow,
            ).logits.float()
            if cfg_scale > 0:
                logits_BTV, unprompted_BTV = logits_BTV.chunk(2)
                logits_BTV = unprompted_BTV + (cfg_scale + 1) * (logits_BTV - unprompted_BTV)
            if eos == "never":  # the end of a turn still ends a text
                logits_BTV[..., end_ids[0]] = -torch.inf
            return logits_BTV

        for start in range(P, T, block_length):
            block = slice(start, start + block_length)
            kept, num_drafted_B1 = None, torch.zeros_like(input_ids[:, :1])
            for step in range(steps_per_block):
                is_hidden_BT = canvas_BT[:, block] == mask_id
                # the schedule has tokens left for every step: do not wait for the device to say so
                if (rule, reviser) != (SCHEDULE, NONE) and not is_hidden_BT.any():
                    break
                # 1. the network; only the current block is read
                if cache != "none" and (step % refresh == 0 if refresh else step == 0):
                    kept = [KeysValues(start) for _ in range(self.config.num_hidden_layers)]
                logits_BTV = block_logits(start, block.stop if append else T, kept)
                logits_BTV, shadow_BTV = logits_BTV[:, :block_length], logits_BTV[:, block_length:]
                # 2. a proposal for every hidden position, and the confidence in it
                choosable_BTV = logits_BTV.clone()
                choosable_BTV[..., mask_id] = -torch.inf
                choosable_BTV[..., num_ids:] = -torch.inf  # padding of the embedding
                choices_BT = pick_tokens(choosable_BTV, temperature, generator, top_k, top_p)
                order = "entropy" if rule == "entropy" else remasking
                order_BT = REMASKING[order](logits_BTV, choices_BT, generator)
                is_last_BT = torch.zeros_like(is_hidden_BT)
                if eos == "last":
                    is_last_BT = is_among(choices_BT, end_ids)
                    order_BT = order_BT.masked_fill(is_last_BT, torch.finfo(order_BT.dtype).min)
                order_BT = order_BT.masked_fill(~is_hidden_BT, -torch.inf)
                # 3. how many are revealed: an equal share in every step that is left, rounded up,
                # or more where the rule is sure of more
                hidden_B1 = is_hidden_BT.sum(1, keepdim=True)
                count_B1 = -(-hidden_B1 // (steps_per_block - step))
                if reviser == LOOP:
                    count_B1 = loop_count(hidden_B1, block_length, step, steps_per_block)
                if rule != SCHEDULE:
                    c_BT = low_confidence(logits_BTV, choices_BT, generator)
                    h_BT = entropies(logits_BTV) if rule == "entropy" else torch.zeros_like(c_BT)
                    sure_B1 = count_sure(rule, amount, c_BT, h_BT, is_hidden_BT & ~is_last_BT)
                    if reviser == WINO:
                        sure_B1 = torch.minimum(sure_B1, most_drafted(hidden_B1))
                    count_B1 = torch.maximum(count_B1, sure_B1)
                # 4. which of the others are masked again
                is_taken_back_BT = torch.zeros_like(is_hidden_BT)
                if reviser == WINO:
                    is_taken_back_BT = taken_back_by_shadow(
                        revise_amount,
                        ~is_hidden_BT,
                        low_confidence(shadow_BTV, canvas_BT[:, block], generator),
                        count_B1,
                        num_drafted_B1,
                        is_last=step == steps_per_block - 1,
                    )
                    num_drafted_B1 = count_B1
                elif reviser != NONE:
                    is_taken_back_BT = taken_back_by_chance(
                        reviser,
                        revise_amount,
                        ~is_hidden_BT,
                        hidden_B1 - count_B1,
                        generator,
                        step=step,
                        steps=steps_per_block,
                    )
                    count_B1 = count_B1 + is_taken_back_BT.sum(1, keepdim=True)
                is_revealed_BT = is_hidden_BT & (ranks(order_BT, descending=True) < count_B1)
                if hasattr(streamer, "put_draft"):
                    draft_BT = torch.where(is_hidden_BT, choices_BT, canvas_BT[:, block])
                    streamer.put_draft(draft_BT.cpu())
                tokens_BT = torch.where(is_revealed_BT, choices_BT, canvas_BT[:, block])
                canvas_BT[:, block] = tokens_BT.masked_fill(is_taken_back_BT, mask_id)
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
