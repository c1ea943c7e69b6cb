"""README.md of an export: what the model is, how it was trained and scored, how to sample from it.

The licence of the weights is the user's to choose, since it depends on the training data and, for a
continued model, on the weights that it started from. So the card names a licence for them only when
one is given. The PyTorch code in the export belongs to llada_jax, so its licence is always named.
"""

import dataclasses
import math
import re

from llada_jax.errors import UserError
from llada_jax.models.transformer import Architecture, num_parameters
from llada_jax.units import format_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What the card says about the training of the weights.

    step: optimizer steps done; 0 for weights that were imported and not trained here. tokens: seen
    in them. batch_size: in rows. sequence_length: in tokens. learning_rate: the peak. schedule,
    optimizer: their names. scores_average: whether the results are those of the moving average.
    imported_from: directory or repository of imported weights, None for others. init_from:
    config.checkpoint.init_from. data: (fingerprint, share of the rows) of each dataset. versions:
    {library: version}. commit: of llada_jax, "" if unknown.
    """

    step: int
    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    schedule: str
    optimizer: str
    scores_average: bool
    imported_from: str | None
    init_from: str
    data: tuple[tuple[str, float], ...]
    versions: dict[str, str]
    commit: str


def check_license(license_id: str | None) -> None:
    """Raises UserError unless it is None or could be an identifier of the Hub, such as "cc-by-4.0".

    The list of the Hub grows, so only the form is checked. What does not have it could break the
    YAML at the head of the card.
    """
    if license_id is not None and not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*", license_id):
        raise UserError(
            f"--license {license_id!r} must be an identifier of the Hub in lower case, such as "
            "apache-2.0, mit or cc-by-4.0; for a licence that the Hub does not list, write other."
        )


def model_card(
    *,
    name: str,
    a: Architecture,
    layout: str,
    dtype: str,
    weights: str,
    training: Training,
    result: dict | None,
    hf_config: dict,
    special_tokens: dict[str, str],
    has_tokenizer: bool = True,
    license_id: str | None = None,
) -> str:
    """Returns README.md.

    Args:
        name: what the directory, or the repository, is called.
        weights: "parameters" or "moving average of the parameters".
        result: of llada_jax.run.metrics_file.last_bound.
        has_tokenizer: whether the export holds one; without it the snippets work on token ids.
        license_id: the licence of the weights as the Hub writes it, such as "mit"; None leaves it
            open.
    """
    shape = [f"| {key} | {value} |" for key, value in dataclasses.asdict(a).items()]
    ids = [
        f"| {what} | {hf_config[f'{what}_token_id']} | `{token}` |"
        for what, token in special_tokens.items()
    ]
    # Short enough for a model that was trained on short rows, and long enough for a first look.
    gen_length = min(64, max(1, training.sequence_length // 2))
    return "\n".join(
        [
            "---",
            *([f"license: {license_id}"] if license_id else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- llada",
            "- masked-diffusion",
            "- llada_jax",
            "---",
            "",
            f"# {name}",
            "",
            "A masked diffusion language model (LLaDA, arXiv 2502.09992) of "
            f"{format_count(num_parameters(a))} parameters, trained with llada_jax and exported in "
            f"the layout `{layout}`, {dtype}, from the {weights}.",
            "",
            "## Training",
            "",
            *_training(training),
            "",
            "## Held-out text",
            "",
            _result(result, training),
            "",
            "## Sampling",
            "",
            *(_text_snippets if has_tokenizer else _id_snippets)(name, gen_length),
            "",
            "`generate_diffusion` fills masks; the autoregressive `generate` of transformers does "
            "not apply to this model. `commit`, `cache` and the other settings are explained in "
            "diffusion_sampler.py, and transformers 5 calls the same sampler for `model.generate("
            f'..., custom_generate="{name}", trust_remote_code=True)`.',
            "",
            "## Network",
            "",
            "| | |",
            "|---|---|",
            *shape,
            f"| trained on rows of | {training.sequence_length} tokens |",
            "",
            "| special token | id | |",
            "|---|---|---|",
            *ids,
            "",
            "## Licence",
            "",
            *_licence(license_id),
            "",
        ]
    )


def _text_snippets(name: str, gen_length: int) -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        # The tokenizer's class comes from the config, which is code of the export: without the
        # flag this line would stop and ask whether to run it.
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        "model = model.eval()",
        # as llada_jax reads a text: some imported tokenizers end it with EOS
        'prompt = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")',
        f"canvas = model.generate_diffusion(prompt.input_ids, gen_length={gen_length}, "
        f"block_length={gen_length}, steps={gen_length})",
        "print(tokenizer.decode(canvas[0], skip_special_tokens=True))",
        "```",
        "",
        "or with llada_jax:",
        "",
        "```python",
        "import llada_jax",
        "",
        f'model = llada_jax.load("{name}")',
        f'print(model.generate(["Once upon a time"], gen_length={gen_length}))',
        "```",
    ]


def _id_snippets(name: str, gen_length: int) -> list[str]:
    return [
        "The weights came without a tokenizer, and the model generates token ids:",
        "",
        "```python",
        "import llada_jax",
        "",
        f'model = llada_jax.load("{name}")',
        f"print(model.generate_tokens([[1, 2, 3]], gen_length={gen_length}))",
        "```",
    ]


def _licence(license_id: str | None) -> list[str]:
    weights = (
        f"- The weights are licensed under `{license_id}`."
        if license_id
        else "- No licence has been chosen for the weights: add `license:` to the head of this "
        "file before publishing."
    )
    code = "https://www.apache.org/licenses/LICENSE-2.0"
    return [
        weights,
        f"- The Python files in this directory are part of llada_jax: [Apache-2.0]({code}).",
    ]


def _training(training: Training) -> list[str]:
    lines = ["- not trained here: imported as it was"]
    if training.step:
        lines = [
            f"- {training.tokens:,} tokens seen in {training.step:,} steps of "
            f"{training.batch_size} rows"
        ]
    if training.imported_from is not None:
        lines.append(f"- weights imported from `{training.imported_from}`")
    if training.init_from:
        lines.append(f"- continued from `{training.init_from}`")
    lines += [
        f"- data with fingerprint `{fingerprint[:16]}`, {share:.1%} of the rows"
        for fingerprint, share in training.data
    ]
    if training.step:
        lines.append(
            f"- {training.optimizer}, learning rate {training.learning_rate:g}, schedule "
            f"{training.schedule}"
        )
    made = ", ".join(f"{name} {version}" for name, version in training.versions.items())
    commit = f", commit {training.commit[:12]}" if training.commit else ""
    return [*lines, f"- {made}{commit}"]


def _result(result: dict | None, training: Training) -> str:
    if result is None:
        return "Not measured."
    bound = (
        "NELBO (an upper bound on the negative log-likelihood)"
        if result["name"] == "nelbo"
        else "NLL"
    )
    error, bits, num_splits = (result[key] for key in ("nats_error", "bits_per_byte", "num_splits"))
    numbers = f"{result['nats_per_token']:.4f}"
    numbers += f" +- {error:.4f} nats per token" if math.isfinite(error) else " nats per token"
    numbers += f", {bits:.4f} bits per byte" if math.isfinite(bits) else ""
    late = "" if result["step"] == training.step else f" at step {result['step']:,}"
    splits = f", the mean of {num_splits} held-out splits" if num_splits > 1 else ""
    average = ", measured with the moving average of the parameters"
    return f"{bound}{late}: {numbers}{splits}{average if training.scores_average else ''}."
