"""The objective that a config names."""

from typing import Any

from llada_jax.errors import UserError
from llada_jax.objectives.autoregressive import autoregressive
from llada_jax.objectives.masked_diffusion import masked_diffusion
from llada_jax.objectives.objective import Objective
from llada_jax.objectives.sft import sft
from llada_jax.objectives.vrpo import vrpo
from llada_jax.parts import call_part, is_own, load_part, with_arguments

OBJECTIVES = {
    "masked_diffusion": masked_diffusion,
    "sft": sft,
    "vrpo": vrpo,
    "autoregressive": autoregressive,
}


def make_objective(
    tokenizer: Any,
    *,
    name: str,
    eps: float = 1e-3,
    t_sampling: str = "stratified",
    bell_width: float = 0.2,
    masking: str = "bernoulli",
    weight: str = "1/p",
    masked: str = "answers",
    mean_over: str = "answers",
    max_mask_ratio: float = 1.0,
    complementary: bool = False,
    prompt_dropout: float = 0.0,
    beta: float = 0.1,
    num_times: int = 8,
    masks_per_time: int = 1,
    shared_draws: bool = True,
    arguments: Any = (),
) -> Objective:
    """Returns the objective of config.objective, whose knobs are the keyword arguments.

    Args:
        tokenizer: mask_id, bos_id and vocab_size are read.
        name: a key of OBJECTIVES, or module:attribute of a function
            (*, mask_id, bos_id, vocab_size, **arguments) -> Objective.
        arguments: ((name, value), ...), for an objective of your own.

    Raises:
        UserError: there is no such objective, or it does not keep the contract.
    """
    make = load_part(name, "objective", OBJECTIVES)
    if is_own(name):
        given = {name: getattr(tokenizer, name) for name in ("mask_id", "bos_id", "vocab_size")}
        own = with_arguments(given, arguments, name, "objective")
        objective = call_part(make, name, "objective", **own)
        if not isinstance(objective, Objective):
            raise UserError(
                f"The objective {name!r} returns a {type(objective).__name__}; it must return a "
                "llada_jax.objectives.objective.Objective."
            )
        return objective
    if name == "autoregressive":
        return make(bos_id=tokenizer.bos_id)
    if name == "sft":
        return make(
            mask_id=tokenizer.mask_id,
            eps=eps,
            t_sampling=t_sampling,
            weight=weight,
            masked=masked,
            mean_over=mean_over,
            max_mask_ratio=max_mask_ratio,
            complementary=complementary,
            prompt_dropout=prompt_dropout,
        )
    if name == "vrpo":
        return make(
            mask_id=tokenizer.mask_id,
            eps=eps,
            t_sampling=t_sampling,
            masking=masking,
            beta=beta,
            num_times=num_times,
            masks_per_time=masks_per_time,
            shared_draws=shared_draws,
        )
    return make(
        mask_id=tokenizer.mask_id,
        eps=eps,
        t_sampling=t_sampling,
        bell_width=bell_width,
        masking=masking,
        weight=weight,
        complementary=complementary,
    )
