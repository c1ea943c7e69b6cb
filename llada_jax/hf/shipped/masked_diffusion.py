"""What the masked diffusion language models of this directory share: parts of the network and the
loss; the sampler is in diffusion_sampler.py.

Needs PyTorch and transformers (4.49 to 5.x) only. Names carry shapes: B rows, T positions, S
positions attended to, D width, N query heads, H width of a head, V vocabulary. The method is that
of LLaDA (arXiv 2502.09992).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

EPS = 1e-3  # floor of the masking probability, which bounds the weight 1/p


class RMSNorm(nn.Module):
    """Float32 inside, cast back to the dtype of x, then scaled."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def residual_linear(
    num_in: int, num_out: int, layer_number: int, *, bias: bool = False
) -> nn.Linear:
    """Returns a linear layer that writes to the residual stream: initialised smaller, the deeper
    (0, 1, ...) it lies.
    """
    layer = nn.Linear(num_in, num_out, bias=bias)
    layer.init_shrink = (2 * (layer_number + 1)) ** -0.5
    return layer


# the numbers of rope_type "llama3"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def scaling_of(config) -> dict | None:
    """Returns how the rotary frequencies are scaled, under the name of transformers 4 or that of 5;
    None if they are not.
    """
    return getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None)


def is_llama3(scaling: dict) -> bool:
    """Whether `rotary_angles` takes a scaling; older files call its rope_type "type"."""
    numbers = [scaling.get(name) for name in LLAMA3]
    if not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        return False
    return scaling.get("rope_type", scaling.get("type")) == "llama3" and numbers[1] < numbers[2]


def rotary_angles(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the rotary angles, float32 [B, 1, T, H/2] (RoFormer, arXiv
    2104.09864), scaled as in Llama 3.1.

    What turns less than low_freq_factor times within the original length is slowed down by the
    factor, what turns more than high_freq_factor times is kept, and between them the two are mixed
    in proportion to the turns.
    """
    halves = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = theta ** (-halves / head_dim)
    if scaling:
        factor, low, high, original = (scaling[name] for name in LLAMA3)
        turns = original / (2 * torch.pi) * frequencies
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    angles = positions_BT[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + H/2) of every head, in float32: in bfloat16, position 257 would
    be 256.
    """
    first, second = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        x_BNTH.dtype
    )


def attend(
    q_BTD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    *,
    head_dim: int,
    rotary,
    is_seen,
    cache=None,
) -> Tensor:
    """Bidirectional attention of rotated heads; fewer key/value heads than query heads are shared
    by groups of them. A cache (diffusion_sampler.KeysValues) adds those of columns that are not
    computed.
    """
    q_BNTH, k_BNSH, v_BNSH = (
        x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q_BTD, k_BTD, v_BTD)
    )
    q_BNTH, k_BNSH = rotate(q_BNTH, *rotary), rotate(k_BNSH, *rotary)
    if cache is not None:
        k_BNSH, v_BNSH = cache.joined(k_BNSH, v_BNSH)
    group = q_BNTH.shape[1] // k_BNSH.shape[1]
    if group > 1:
        k_BNSH, v_BNSH = (
            k_BNSH.repeat_interleave(group, dim=1),
            v_BNSH.repeat_interleave(group, dim=1),
        )
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BNSH, v_BNSH, attn_mask=is_seen, is_causal=False
    )
    return out_BNTH.transpose(1, 2).flatten(2)


def corrupt(
    tokens_BT: Tensor,
    is_maskable_BT: Tensor,
    *,
    mask_id: int,
    generator: torch.Generator | None = None,
):
    """The forward process: t ~ U(0, 1) for each row, then each maskable token is masked with
    p = (1 - EPS) t + EPS.

    Returns:
        noisy_BT, is_masked_BT and p_B1 (float32). Everything is drawn on the device of `generator`,
        or else on that of the tokens from the global generator (torch.manual_seed).
    """
    device = tokens_BT.device if generator is None else generator.device
    t_B1 = torch.rand(len(tokens_BT), 1, generator=generator, device=device)
    draw_BT = torch.rand(tokens_BT.shape, generator=generator, device=device)
    p_B1 = (1 - EPS) * t_B1 + EPS
    is_masked_BT = (draw_BT < p_B1).to(tokens_BT.device) & is_maskable_BT
    return tokens_BT.masked_fill(is_masked_BT, mask_id), is_masked_BT, p_B1.to(tokens_BT.device)


def masked_diffusion_loss(
    logits_BTV: Tensor, targets_BT: Tensor, is_masked_BT: Tensor, p_B1: Tensor, count
) -> Tensor:
    """Returns the sum over masked tokens of -log p(target) / p, divided by `count`, in nats (LLaDA,
    eq. 3).
    """
    nll = F.cross_entropy(
        logits_BTV[is_masked_BT].float(), targets_BT[is_masked_BT], reduction="none"
    )
    return (nll / p_B1.expand_as(is_masked_BT)[is_masked_BT]).sum() / count


def sees_shadow(x_BTD: Tensor, shadow: Tensor) -> Tensor:
    """Returns whether each position may attend to each other one, bool [T, T], where the last ones
    are a shadow of the columns with the numbers `shadow` (WINO, arXiv 2507.18578).
    """
    T, device = x_BTD.shape[1], x_BTD.device
    is_shadow_T = torch.arange(T, device=device) >= T - len(shadow)
    sees_TT = is_shadow_T[:, None] | ~is_shadow_T
    sees_TT[torch.arange(T - len(shadow), T, device=device), shadow.to(device)] = False
    return sees_TT


class MaskedDiffusionLM(PreTrainedModel, GenerationMixin):
    """A bidirectional Transformer that predicts the tokens under the masks.

    A subclass builds the modules under its own names and returns them from `transformer_parts`. Its
    config has mask_token_id, eos_token_id, head_dim, rope_theta and, where the rotary frequencies
    are scaled, rope_parameters.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # transformers.Trainer then hands in num_items_in_batch
    _supports_sdpa = True
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies the code next to the weights

    required = {}  # config key -> the one value (or tuple of values) that this file expresses

    def __init__(self, config):
        for key, wanted in self.required.items():
            values = wanted if isinstance(wanted, tuple) else (wanted,)
            if getattr(config, key, values[0]) not in values:
                raise ValueError(
                    f"config.json: {key}={getattr(config, key)!r} is not supported by "
                    f"{type(self).__name__}; it expresses only {' or '.join(map(repr, values))}."
                )
        scaling = scaling_of(config)
        if scaling and not is_llama3(scaling):
            raise ValueError(
                f"config.json: rope_parameters={scaling!r} is not supported by "
                f"{type(self).__name__}; it expresses only None or rope_type 'llama3' with "
                f"positive {', '.join(LLAMA3)}, low_freq_factor less than high_freq_factor."
            )
        super().__init__(config)
        self.gradient_checkpointing = False

    def transformer_parts(self) -> tuple[nn.Embedding, nn.ModuleList, nn.Module, nn.Module]:
        """Returns embedding, layers, final norm and head; the head is the embedding where they
        share one matrix. The class of each layout defines it.
        """
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer_parts()[0]

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer_parts()[3]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published "mitchell": standard deviation 1 / sqrt(input width), truncated at 3 of
        them; norms 1, biases 0.
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = getattr(module, "init_shrink", 1.0) * module.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        *,
        num_items_in_batch=None,
        generator=None,
        columns=None,
        cache=None,
        shadow=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ) -> CausalLMOutput | tuple:
        """Returns logits [B, T, V] in the dtype of the model and, given labels, the masked
        diffusion loss.

        Args:
            input_ids: [B, T]; without labels they may contain masks, with labels they are the clean
                tokens.
            attention_mask: [B, T], nonzero = real, zero = padding, which is never attended to. What
                comes out at padding has no meaning.
            position_ids: [B, T]; 0, 1, ... T - 1 unless given.
            inputs_embeds: [B, T, D] in place of input_ids; without labels.
            labels: [B, T]: the clean tokens again, -100 where a token is never masked (a prompt,
                padding). The model masks input_ids itself, draws t ~ U(0, 1) for each row and
                returns sum(nll / p) / count, where p = (1 - EPS) t + EPS, the sum runs over the
                masked tokens and count over the maskable ones. The logits are those of the masked
                input.
            num_items_in_batch: the count to divide by; that of this batch unless given.
            generator: makes t and the masks reproducible.
            columns: a slice or the numbers of the positions whose logits are returned; all unless
                given.
            cache: of the sampler, one KeysValues per layer. attention_mask then covers all columns
                of the canvas, and the other arguments those that are computed.
            shadow: of the sampler, the numbers of the columns of which the last positions are the
                shadow: they see what the columns themselves see, but for the column in their own
                place, and each other; nothing else sees them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if labels is not None and input_ids is None:
            raise ValueError(
                "labels need input_ids: the loss masks tokens, which inputs_embeds no longer are."
            )
        if past_key_values is not None or use_cache:
            raise ValueError(
                "past_key_values and use_cache=True do not exist here: every position sees every "
                "other; generate_diffusion has a cache of its own."
            )
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not supported: fused attention never forms the weights."
            )

        is_real_BT = None if attention_mask is None else self._is_real(attention_mask)
        if labels is not None:
            is_maskable_BT = labels != -100
            if is_real_BT is not None:
                is_maskable_BT = is_maskable_BT & is_real_BT
            input_ids, is_masked_BT, p_B1 = corrupt(
                input_ids, is_maskable_BT, mask_id=self.config.mask_token_id, generator=generator
            )
        x_BTD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        kept = [] if output_hidden_states else None
        x_BTD = self._run_layers(x_BTD, is_real_BT, position_ids, kept, cache, shadow)
        logits_BTV = self._logits(x_BTD, is_real_BT, columns)
        loss = None
        if labels is not None:
            count = (
                is_maskable_BT.sum().clamp(min=1)
                if num_items_in_batch is None
                else num_items_in_batch
            )
            loss = masked_diffusion_loss(logits_BTV, labels, is_masked_BT, p_B1, count)
        output = CausalLMOutput(loss=loss, logits=logits_BTV, hidden_states=kept and tuple(kept))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _is_real(attention_mask: Tensor) -> Tensor | None:
        """Returns bool [B, T]; None where nothing is padding, because attention is faster without a
        mask.
        """
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, "
                "positions]."
            )
        is_real_BT = attention_mask != 0
        return None if is_real_BT.all() else is_real_BT

    def _run_layers(
        self, x_BTD: Tensor, is_real_BT, positions_BT, kept: list | None, cache, shadow
    ) -> Tensor:
        """Returns the normed output of the last layer; appends the input of every layer and the
        result to `kept`.
        """
        _, layers, final_norm, _ = self.transformer_parts()
        if positions_BT is None:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        rotary = rotary_angles(
            positions_BT, self.config.head_dim, self.config.rope_theta, scaling_of(self.config)
        )
        is_seen = None
        # a row of padding alone sees all of itself: older PyTorch has NaN for nothing seen
        if is_real_BT is not None:
            is_seen = (is_real_BT | ~is_real_BT.any(1, keepdim=True))[:, None, None, :]
        if shadow is not None:
            is_seen = sees_shadow(x_BTD, shadow) & (True if is_seen is None else is_seen)
        for number, layer in enumerate(layers):
            if kept is not None:
                kept.append(x_BTD)
            if self.gradient_checkpointing and self.training:
                x_BTD = self._gradient_checkpointing_func(layer.__call__, x_BTD, rotary, is_seen)
            else:
                x_BTD = layer(x_BTD, rotary, is_seen, None if cache is None else cache[number])
        x_BTD = final_norm(x_BTD)
        if kept is not None:
            kept.append(x_BTD)
        return x_BTD

    def _logits(
        self, x_BTD: Tensor, is_real_BT: Tensor | None, columns: slice | None = None
    ) -> Tensor:
        x_BTD = x_BTD if columns is None else x_BTD[:, columns]
        head = self.get_output_embeddings()
        return head(x_BTD) if isinstance(head, nn.Linear) else F.linear(x_BTD, head.weight)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, inputs=None, *args, custom_generate=None, **kwargs):
        """Runs the sampler for custom_generate=DIRECTORY, as transformers 5 does; nothing else is
        autoregressive here.
        """
        if isinstance(custom_generate, str) and hasattr(GenerationMixin, "load_custom_generate"):
            return GenerationMixin.generate(
                self, inputs, *args, custom_generate=custom_generate, **kwargs
            )
        raise NotImplementedError(
            f"{type(self).__name__} does not write from left to right; call "
            "model.generate_diffusion(input_ids, attention_mask, gen_length=..., steps=...) in "
            "place of generate(), or, in transformers 5, name this model's directory as "
            "custom_generate with trust_remote_code=True."
        )

    prepare_inputs_for_generation = generate  # peft looks it up in every causal language model
