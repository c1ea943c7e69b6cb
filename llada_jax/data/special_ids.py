"""The special ids mask, eos, bos, pad and eot: how published files name and state them, and which
ids can be them.
"""

from llada_jax.errors import UserError
from llada_jax.ranges import MAX_SIZE
from llada_jax.schemas import ModelConfig, TokenizerConfig, check, parse_json

# How published tokenizers call the token that ends a turn of a conversation.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")

# What published tokenizers call their special tokens, the likeliest first. Looked up after what the
# tokenizer itself declares.
SPECIAL_NAMES = {
    "mask": ("<mask>", "[MASK]", "<|mdm_mask|>", "<|mask|>", "<[MASK]>", "<|mask_token|>"),
    "eos": (
        "</s>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
        "[EOS]",
        "[SEP]",
    ),
    "bos": (
        "<s>",
        "<|startoftext|>",
        "<|begin_of_text|>",
        "<bos>",
        "<｜begin▁of▁sentence｜>",
        "[BOS]",
        "[CLS]",
    ),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
}


class WrongSpecialIds(UserError):
    """Special ids that no tokenizer can have, as the end of a sentence."""


def check_special_ids(special_ids: dict[str, int]) -> None:
    """Raises WrongSpecialIds unless all are ids, and the mask is none of the others.

    With a mask that also ends texts, an end that is masked would look like one that is not. Of the
    others some may be equal, as in the published LLaDA.
    """
    if not isinstance(special_ids, dict):
        raise WrongSpecialIds(f"has the special ids {special_ids!r}, which are not an object")
    for what in {"mask": 0, "eos": 0} | special_ids:
        number = special_ids.get(what)
        if type(number) is not int or not 0 <= number < MAX_SIZE:
            raise WrongSpecialIds(
                f"has the {what} id {number!r}, which is not an integer from 0 to {MAX_SIZE - 1}"
            )
        if what != "mask" and number == special_ids["mask"]:
            raise WrongSpecialIds(f"has one id, {number}, for mask and {what}")


def declared_in_config(folder) -> dict[str, str]:
    """Returns {"mask": "<mask>", ...} as far as the tokenizer_config.json next to a tokenizer.json
    declares them.
    """
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    declared = check(parse_json(file.read_bytes(), file=file), TokenizerConfig, file=file)
    tokens = {what: getattr(declared, f"{what}_token") for what in SPECIAL_NAMES}
    names = {what: getattr(token, "content", token) for what, token in tokens.items()}
    return {what: name for what, name in names.items() if name}


def stated_in_model_config(folder, *, num_ids: int) -> dict[str, int]:
    """Returns {"mask": 126336, ...} as far as the config.json of the checkpoint next to a
    tokenizer.json states ids that the tokenizer has.
    """
    file = folder / "config.json"
    if not file.exists():
        return {}
    return stated_ids(parse_json(file.read_bytes(), file=file), num_ids=num_ids, file=file)


def stated_ids(hf_config: dict, *, num_ids: int, file) -> dict[str, int]:
    """Returns {"mask": 126336, ...} as far as a config.json states ids below `num_ids`."""
    config = check(hf_config, ModelConfig, file=file)
    ids = {what: getattr(config, f"{what}_token_id") for what in (*SPECIAL_NAMES, "eot")}
    # Of several end-of-text ids, the first is the one that ended the texts in training.
    ids = {what: i[0] if isinstance(i, list) else i for what, i in ids.items()}
    return {what: i for what, i in ids.items() if i is not None and 0 <= i < num_ids}
