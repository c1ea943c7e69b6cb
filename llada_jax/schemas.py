"""What JSON that comes from elsewhere may hold: the type and the range of every key that this
package reads.

A value of another type would otherwise be found deep inside a library, as a traceback, and one out
of range not at all. What the network cannot express is another question (hf/config_json.py).
Keys that are not read are not checked.
"""

import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from llada_jax.errors import UserError, one_line
from llada_jax.ranges import MAX_SIZE, RANGES

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, lt=MAX_SIZE)]
# Published files say -1 where there is no such token.
OptionalId = Annotated[int, Field(ge=-1, lt=MAX_SIZE)]
# Of records, tokens or bytes.
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Schema(BaseModel):
    """An object of which only the stated keys are checked; null stands for an absent key."""

    # Strict, so that true is not a 1 and "128" is not a number.
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Rotary(Schema):
    """rope_scaling or rope_parameters of a config.json."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    partial_rotary_factor: Positive | None = None


class ModelConfig(Schema):
    """config.json, in the names of LLaDA and of Llama."""

    model_type: str | None = None
    vocab_size: Size | None = None
    embedding_size: Size | None = None
    unpadded_vocab_size: Size | None = None
    d_model: Size | None = None
    n_layers: Size | None = None
    n_heads: Size | None = None
    n_kv_heads: Size | None = None
    mlp_hidden_size: Size | None = None
    max_sequence_length: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Annotated[int, Field(ge=2, le=MAX_SIZE, multiple_of=2)] | None = None
    max_position_embeddings: Size | None = None
    rope_theta: Positive | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    rope_scaling: Rotary | None = None
    rope_parameters: Rotary | None = None
    weight_tying: bool | None = None
    tie_word_embeddings: bool | None = None
    multi_query_attention: bool | None = None
    attention_layer_norm: bool | None = None
    output_shift: bool | None = None
    layer_types: list[str] | None = None
    mask_token_id: Id | None = None
    eot_token_id: Id | None = None
    eos_token_id: Id | Annotated[list[Id], Field(min_length=1)] | None = None
    bos_token_id: OptionalId | None = None
    pad_token_id: OptionalId | None = None


class GenerationConfig(Schema):
    """generation_config.json."""

    eos_token_id: Id | Annotated[list[Id], Field(min_length=1)] | None = None
    bos_token_id: OptionalId | None = None
    pad_token_id: OptionalId | None = None


class Token(Schema):
    """A special token that is written as an object."""

    content: str


class NamedTemplate(Schema):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(Schema):
    """tokenizer_config.json."""

    mask_token: str | Token | None = None
    eos_token: str | Token | None = None
    bos_token: str | Token | None = None
    pad_token: str | Token | None = None
    chat_template: str | list[NamedTemplate] | None = None


class AddedToken(Schema):
    """One of the added_tokens of a tokenizer.json."""

    id: Id
    content: str


class TokenizerJson(Schema):
    """tokenizer.json, as far as it is not left to the tokenizers library."""

    added_tokens: list[AddedToken] = []
    model: dict[str, Any]


class Index(Schema):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


def _knob(name: str):
    """The range of a knob of the config, for a value that was once that knob."""
    allowed = RANGES[name]
    least, most = ("gt" if allowed.above else "ge"), ("lt" if allowed.below else "le")
    bounds: dict[str, Any] = {least: allowed.least, most: allowed.most}
    return Field(**bounds)


class RecordedArchitecture(Schema):
    """The architecture in a run.json, see llada_jax.models.transformer.Architecture."""

    vocab_size: Size
    num_layers: Annotated[int, _knob("model.num_layers")]
    d_model: Annotated[int, _knob("model.d_model")]
    num_heads: Annotated[int, _knob("model.num_heads")]
    num_kv_heads: Annotated[int, _knob("model.num_kv_heads")]
    head_dim: Annotated[int, _knob("model.head_dim")]
    d_ff: Annotated[int, _knob("model.d_ff")]
    rope_theta: Annotated[Finite, _knob("model.rope_theta")] = 1.0
    rope_scaling: list[float] = []
    norm_eps: Annotated[Finite, _knob("model.norm_eps")] = 1.0
    tie_embeddings: bool = False
    qk_norm: Literal["none", "full", "per_head"] = "none"
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    output_shift: bool = False


class RecordedMask(Schema):
    """The mask in a run.json, see llada_jax.masks.Mask."""

    causal: bool = False
    block_length: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0


class RecordedLora(Schema):
    """The group `lora` of the config in a run.json, see llada_jax.models.adapters.Lora."""

    rank: Annotated[int, _knob("lora.rank")] = 0
    alpha: Annotated[Finite, _knob("lora.alpha")] = 1.0
    targets: str = ""
    frozen_dtype: str = "float32"


def _inside(file: str) -> str:
    if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise ValueError("must name a file in the directory of the data set")
    return file


class StoredShard(Schema):
    """A file of records in a dataset.json, see llada_jax.data.shards.Shard."""

    file: Annotated[str, AfterValidator(_inside)]
    num_records: Count
    # of version 0.1, whose records have different sizes
    num_bytes_on_disk: Count | None = None


class StoredSplit(Schema):
    """A split in a dataset.json, see llada_jax.data.records.Split."""

    num_records: Count
    num_tokens: Count
    num_bytes: Count
    num_documents: Count
    num_padding: Count
    num_scored_tokens: Count | None = None
    num_scored_bytes: Count | None = None
    shards: list[StoredShard]

    @model_validator(mode="after")
    def _adds_up(self):
        if sum(shard.num_records for shard in self.shards) != self.num_records:
            raise ValueError("must have the num_records to which its shards add up")
        return self


class StoredDialogues(Schema):
    """How a data set of dialogues is read, see llada_jax.data.records.Dialogues."""

    turns: Literal["one", "all", "each"]
    rows: Literal["packed", "padded"]
    records: Literal["dialogues", "pairs"] = "dialogues"


class StoredTokenizer(Schema):
    """The identity of a tokenizer in a dataset.json; ids that it does not state are 0."""

    fingerprint: str
    vocab_size: Size
    mask_id: Id | None = None
    eos_id: Id | None = None
    bos_id: Id | None = None
    pad_id: Id | None = None

    @model_validator(mode="after")
    def _has_its_ids(self):
        others = [i for i in (self.eos_id, self.bos_id, self.pad_id) if i is not None]
        if max([self.mask_id or 0, *others]) >= self.vocab_size:
            raise ValueError(f"must have ids below its vocab_size of {self.vocab_size}")
        if self.mask_id is not None and self.mask_id in others:
            raise ValueError(f"must have the id {self.mask_id} for its mask alone")
        return self


class DatasetJson(Schema):
    """dataset.json, see llada_jax.data.records.DatasetInfo."""

    sequence_length: Annotated[int, Field(ge=2, le=MAX_SIZE)]
    fingerprint: str
    tokenizer: StoredTokenizer
    splits: dict[str, StoredSplit]
    dialogues: StoredDialogues | None = None
    lengths: dict[str, dict[Annotated[str, StringConstraints(pattern="^[0-9]+$")], Count]] = {}


class SavedTokenizer(Schema):
    """special_ids.json, by which a saved tokenizer is recognised."""

    kind: Literal["sentencepiece", "huggingface", "bytes", "none"]
    special_ids: dict[Literal["mask", "eos", "bos", "pad", "eot"], Id]


# What pydantic calls a value of another type.
EXPECTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
}

AnySchema = TypeVar("AnySchema", bound=Schema)


class SampleQuality(Schema):
    """Measures of samples in a frontier.json, see llada_jax.evaluation.sample_quality."""

    bits_per_byte: NotNegative
    repetition: NotNegative
    unigram_distance: NotNegative


class FrontierRow(SampleQuality):
    """What one setting of the sampler costs, and how good its samples are."""

    family: str
    name: str
    passes_per_token: NotNegative
    columns_per_token: NotNegative
    is_no_worse: bool


class Frontier(Schema):
    """frontier.json, as benchmarks/frontier.py writes it."""

    baselines: dict[str, SampleQuality]
    rows: Annotated[list[FrontierRow], Field(min_length=1)]


def parse_json(content: str | bytes, *, file) -> dict:
    """Returns the object in a JSON file.

    Args:
        file: what it is called, for messages.

    Raises:
        UserError: it is not JSON, or holds another value than an object, or half of a surrogate
            pair, which an escape can write and no UTF-8 can hold.
    """
    try:
        parsed = json.loads(content)
        json.dumps(parsed, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({one_line(str(error))}); fetch it again."
        ) from (error)
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply to be read; fetch it again.") from error
    if not isinstance(parsed, dict):
        raise UserError(
            f"{file} holds a {type(parsed).__name__} where an object is expected; fetch it again."
        )
    return parsed


def check(content: dict, schema: type[AnySchema], *, file) -> AnySchema:
    """Returns the checked keys of an object.

    Raises:
        UserError: the first key that is missing, of another type, or out of range.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        place, shown, says = _first_fault(content, error)
        if not says:
            raise UserError(f"{file} has no {place}; fetch the whole file.") from error
        raise UserError(f"{file}: {place}={shown} {says}; fetch the file again.") from error


def fault_of(content: dict, schema: type[Schema]) -> str:
    """Returns the same fault as the end of a sentence about the object, such as "has no field
    'd_ff'"; "" if there is none.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        place, shown, says = _first_fault(content, error)
        if not says:
            return f"has no field {place!r}"
        return f"has {place}={shown}, which {says}" if place else f"is {shown}, which {says}"
    return ""


def _first_fault(content: dict, error: ValidationError) -> tuple[str, str, str]:
    """Returns (place, value, what it must be); the last is "" where nothing is in that place."""
    first = error.errors(include_url=False)[0]
    # Only keys and positions: pydantic also names the member of a union that it has tried.
    place, value = "", content
    for key in first["loc"]:
        if isinstance(value, dict) and key in value:
            place += f".{key}" if place else str(key)
        elif isinstance(value, list) and isinstance(key, int):
            place += f"[{key}]"
        else:
            continue
        value = value[key]
    if first["type"] == "missing":
        return f"{place}.{first['loc'][-1]}".lstrip("."), "", ""
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    message = first["msg"].replace("Input should", "must").replace("String should", "must")
    says = EXPECTED.get(first["type"]) or message.removeprefix("Value error, ")
    return place, shown, says
