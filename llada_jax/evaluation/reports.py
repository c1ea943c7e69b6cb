"""The results of evaluations as aligned lines of text."""

import math

from llada_jax.evaluation.tasks import DIRECTIONS


def report_harness(result: dict) -> str:
    """Returns the lines of every task of lm-evaluation-harness."""
    lines = [f"lm-evaluation-harness, model at step {result['step']}"]
    for name, answered in result["tasks"].items():
        lines += harness_lines(name, answered)
    return "\n".join(lines)


def harness_lines(name: str, answered: dict) -> list[str]:
    """Returns one line per metric of a task: its value, the error of the sample, that of the Monte
    Carlo; and the published result, where it was asked with a preset.
    """
    lines = []
    for task, metrics in answered["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("stderr") or not isinstance(value, float):
                continue
            line = f"  {task}  {metric}  {value:.4f}"
            for error_name, what in (("stderr", "sample"), ("mc_stderr", "Monte Carlo")):
                error = metrics.get(f"{metric}_{error_name},{filtered}")
                if isinstance(error, float) and math.isfinite(error):
                    line += f"  +- {error:.4f} ({what})"
            lines.append(line)
    if answered.get("estimator") == "confidence_order":
        lines.append(f"  {name}  confidence_order, which is not a bound")
    if "published_percent" in answered:
        lines.append(f"  {name}  published  {answered['published_percent'] / 100:.4f}")
    return lines


def report_tasks(result: dict) -> str:
    """Returns one line per direction."""
    lines = [f"{result['tasks']}, answered by the model at step {result['step']}"]
    is_bound = result["estimator"] != "confidence_order"
    for direction in DIRECTIONS:
        if direction not in result:
            continue
        found = result[direction]
        line = (
            f"  {direction:<9}  exact match {found['exact_match']:.3f} +- "
            f"{found['exact_match_standard_error']:.3f} of {found['num_questions']}"
        )
        if found["num_ranked"]:
            line += (
                f", ranked first {found['ranking_accuracy']:.3f} +- "
                f"{found['ranking_standard_error']:.3f} of {found['num_ranked']} (chance "
                f"{found['ranking_chance']:.3f})"
            )
        noise = f"Monte Carlo {found['mc_standard_error']:.2f}"
        line += (
            f", {found['log_likelihood']:.2f} +- {found['standard_error']:.2f} nats per answer "
            f"({noise if is_bound else 'not a bound'})"
        )
        lines.append(line)
    return "\n".join(lines)


def report_split(result: dict) -> str:
    """Returns the result as aligned lines."""
    kind = "exactly" if "nll_nats_per_token" in result else "an upper bound"
    lines = [
        f"bits per byte of the {result['split']} text ({result['num_tokens']:,} tokens), lower is "
        "better",
        f"  {result['bits_per_byte']:.3f} +- {result['bits_per_byte_standard_error']:.3f}  this "
        f"model at step {result['step']}, {kind}",
    ]
    named = {
        "unigram_bits_per_byte": "token frequencies of the training text",
        "xz_bits_per_byte": "xz -9 on this text alone",
        "xz_after_train_bits_per_byte": "xz -9 after reading the training text",
    }
    lines += [
        f"  {result[key]:.3f}           {meaning}"
        for key, meaning in named.items()
        if key in result
    ]
    parts = {
        "by_position": "nats per token, by position in the row",
        "by_time": "nats per masked token, by diffusion time",
    }
    for key, meaning in parts.items():
        shares = result.get(key, {"mean": []})["mean"]
        for number, nats in enumerate(shares):
            if number == 0:
                lines.append(meaning)
            if math.isfinite(nats):
                first, last = number / len(shares), (number + 1) / len(shares)
                error = result[key]["standard_error"][number]
                lines.append(f"  {first:.3f} to {last:.3f}  {nats:.3f} +- {error:.3f}")
    for number, (name, one) in enumerate(result.get("speed", {}).items()):
        if number == 0:
            lines.append("sampling speed, once it is compiled")
        lines.append(
            f"  {name}  {one['tokens_per_s']:.1f} tokens/s, {one['passes_per_token']:.3f} passes "
            f"per token, {one['seconds']:.2f} s"
        )
    return "\n".join(lines)
