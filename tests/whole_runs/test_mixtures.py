"""A run over a mixture of texts whose tokens are longer than a byte, in bits per byte."""

import json
import math

import numpy as np
import pytest
from support.mishaps import prepare_argv, train_argv
from support.runs import metric_lines

from llada_jax.__main__ import main


@pytest.mark.slow
def test_each_source_of_a_mixture_is_measured_by_the_bytes_of_its_own_text(home, tmp_path):
    # words of the first text are single tokens, and digits are not in it
    rng = np.random.default_rng(1)
    lines = ["".join(rng.choice(list("0123456789"), size=40)) for _ in range(300)]
    (tmp_path / "digits.txt").write_text("\n".join(lines) + "\n")
    words = prepare_argv(tmp_path / "digits.txt", tmp_path / "digits", "--documents", "line")
    tokenizer = str(home / "spm" / "tokenizer")
    assert (
        main([tokenizer if word == "bytes" else word for word in [*words, "--heldout", "0.1"]]) == 0
    )

    def split_of(directory, split: str) -> dict:
        return json.loads((directory / "dataset.json").read_text())["splits"][split]

    def bytes_per_token(directory, split: str) -> float:
        content = split_of(directory, split)
        return content["num_bytes"] / content["num_tokens"]

    def of_row(kind: str) -> float:
        """Returns the mean of a count over the rows that training reads."""
        contents = [(share, split_of(directory, "train")) for directory, share in sources.items()]
        return sum(share * content[kind] / content["num_records"] for share, content in contents)

    def bits_per_byte(nats_per_token: float, rate: float):
        return pytest.approx(nats_per_token / math.log(2) / rate, rel=1e-6)

    sources = {home / "spm": 0.25, tmp_path / "digits": 0.75}
    first, second = (bytes_per_token(directory, "train") for directory in sources)
    assert first > 2 * second
    mixture = ",".join(f"{directory}={share}" for directory, share in sources.items())
    knobs = (f"data.path={mixture}", "num_steps=2", "log.every_steps=1")
    assert main(train_argv(home, tmp_path / "run", *knobs)) == 0
    rate = of_row("num_bytes") / of_row("num_tokens")
    for line in metric_lines(tmp_path / "run", "train"):
        train = line["train"]
        assert train["bits_per_byte"] == bits_per_byte(train["nelbo"], rate)
    for number, directory in enumerate(sources):
        group = f"final_{number}_{directory.name}"
        (line,) = metric_lines(tmp_path / "run", group)
        rate = bytes_per_token(directory, "heldout")
        assert line[group]["bits_per_byte"] == bits_per_byte(line[group]["nelbo"], rate)
