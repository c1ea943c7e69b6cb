"""README.md of an export: what the model is, how it was trained and scored, how to sample from it.

The licence of the weights is the user's to choose, since it depends on the training data and, for a
continued model, on the weights that it started from. So the card names a licence for them only when
one is given. The PyTorch code in the export belongs to llada_jax, so its licence is always named.
"""

import dataclasses
import math

from llada_jax.models.transformer import Architecture, num_parameters
from llada_jax.units import format_count


def heldout_result(lines: list[dict], step: int) -> dict | None:
    """Returns the bound on held-out text that the metrics of a run hold for a step: {step, name,
    nats, bits, ...}.

    The final evaluation counts before those during training; of several, the last before or at the
    step.
    """
    found = None
    for line in lines:
        for group in ("heldout", "final"):
            bound = line.get(group)
            name = next((n for n in ("nelbo", "nll") if bound and n in bound), None)
            if name and line["step"] <= step:
                found = {
                    "step": line["step"],
                    "name": name,
                    "nats": bound[name],
                    "bits": bound.get("bits_per_byte"),
                    "standard_error": bound.get("standard_error"),
                    "is_final": group == "final",
                }
    return found


def model_card(
    *,
    name: str,
    a: Architecture,
    layout: str,
    dtype: str,
    weights: str,
    run: dict,
    result: dict | None,
    hf_config: dict,
    special_tokens: dict[str, str],
    license_id: str | None = None,
) -> str:
    """Returns README.md.

    Args:
        name: what the directory, or the repository, is called.
        weights: "parameters" or "moving average of the parameters".
        run: run.json of the checkpoint.
        result: of `heldout_result`.
        license_id: the licence of the weights as the Hub writes it, such as "mit"; None leaves it
            open.
    """
    shape = [f"| {key} | {value} |" for key, value in dataclasses.asdict(a).items()]
    ids = [
        f"| {what} | {hf_config[f'{what}_token_id']} | `{token}` |"
        for what, token in special_tokens.items()
    ]
    sequence_length = run["config"]["data"]["sequence_length"]
    gen_length = min(64, max(1, sequence_length // 2))
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
            *_training(run),
            "",
            "## Held-out text",
            "",
            _result(result, run),
            "",
            "## Sampling",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            # the tokenizer's class comes from the config, which is code of the export: without the
            # flag it stops and asks
            f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
            f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True).eval()',
            'prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids',
            f"canvas = model.generate_diffusion(prompt, gen_length={gen_length}, "
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
            "",
            "`generate_diffusion` fills masks; the autoregressive `generate` of transformers does "
            "not apply to this model.",
            "",
            "## Network",
            "",
            "| | |",
            "|---|---|",
            *shape,
            f"| trained on rows of | {sequence_length} tokens |",
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


def _licence(license_id: str | None) -> list[str]:
    weights = (
        f"- The weights are licensed under `{license_id}`."
        if license_id
        else "- No licence has been chosen for the weights: add `license:` to the head of this file before publishing."
    )
    code = "https://www.apache.org/licenses/LICENSE-2.0"
    return [
        weights,
        f"- The Python files in this directory are part of llada_jax: [Apache-2.0]({code}).",
    ]


def _training(run: dict) -> list[str]:
    config, versions = run["config"], run.get("versions", {})
    lines = [
        f"- {run['tokens']:,} tokens seen in {run['step']:,} steps of "
        f"{config['data']['batch_size']} rows"
        if run.get("step")
        else "- not trained here: imported as it was",
    ]
    if "source" in run:
        lines.append(f"- weights imported from `{run['source'].get('from', '')}`")
    if config["checkpoint"]["init_from"]:
        lines.append(f"- continued from `{config['checkpoint']['init_from']}`")
    lines += [
        f"- data with fingerprint `{data['fingerprint'][:16]}`, {data['share']:.1%} of the rows"
        for data in run["data"]
    ]
    optimizer, schedule = config["optimizer"], config["schedule"]
    if run.get("step"):
        lines.append(
            f"- {optimizer['name']}, learning rate {schedule['learning_rate']:g}, schedule "
            f"{schedule['name']}"
        )
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f", commit {run['commit'][:12]}" if run.get("commit") else ""
    return [*lines, f"- {made}{commit}"]


def _result(result: dict | None, run: dict) -> str:
    if result is None:
        return "Not measured."
    bound = (
        "NELBO (an upper bound on the negative log-likelihood)"
        if result["name"] == "nelbo"
        else "NLL"
    )
    error = result["standard_error"]
    spread = f" +- {error:.4f}" if error is not None and math.isfinite(error) else ""
    bits = f", {result['bits']:.4f} bits per byte" if result["bits"] is not None else ""
    late = "" if result["step"] == run["step"] else f" at step {result['step']:,}"
    average = (
        ", measured with the moving average of the parameters"
        if run["config"]["optimizer"]["ema_decay"]
        else ""
    )
    return f"{bound}{late}: {result['nats']:.4f}{spread} nats per token{bits}{average}."
