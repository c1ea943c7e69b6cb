"""The documented commands of prepare --chat work with the tokenizers that LLaDA publishes, and the
config that is trained next can read what they write. The scripts of the page write what its
commands read.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from support.configs import CONFIGS
from support.documents import commands, prose_of
from support.hf_directories import write_tokenizer
from support.paths import ROOT
from support.required import library

from llada_jax.__main__ import main
from llada_jax.config import load_config
from llada_jax.data.records import Records, read_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.verbs.train import open_batches

SPECIAL = ("<|mdm_mask|>", "<|startoftext|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# That of LLaDA-8B, Base and Instruct, which reads no add_generation_prompt.
ALWAYS_OPEN = (
    "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set c = bos_token + c %}"
    "{% endif %}{{ c }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
RECORDS = [
    {"prompt": f"Q{n}?", "response": f"A{n}.", "chosen": f"A{n}.", "rejected": "I do not know."}
    for n in range(40)
]
FILES = [*CONFIGS, ROOT / "README.md", ROOT / "docs/finetuning.md"]
PREPARED = [
    (file, words)
    for file in FILES
    for words in commands(prose_of(file))
    if words[:2] == ["prepare", "--chat"] and "--input" in words
]
SCRIPTS = re.findall(
    r"^python - <<'END'\n(.*?)^END$",
    (ROOT / "docs/finetuning.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def trains_on(words: list[str], output: str) -> bool:
    if words[0] != "train" or "--config" not in words:
        return False
    path = load_config(str(ROOT / after("--config", words))).data.path
    return f"--config.data.path={output}" in words or path == output


def test_the_configs_of_the_8b_and_the_pages_show_how_dialogues_are_prepared():
    assert [file.stem for file, _ in PREPARED] == (
        ["lora_llada_8b", "sft_llada_8b", "sft_packed", "vrpo_llada_8b", "README"]
        + ["finetuning"] * 5
    )


@pytest.mark.parametrize(
    ("file", "words"), PREPARED, ids=[f"{f.stem}-{after('--output', w)}" for f, w in PREPARED]
)
def test_a_documented_preparation_works_with_the_template_of_llada(file, words, tmp_path):
    write_tokenizer(tmp_path, *SPECIAL, *HEADERS, chat_template=ALWAYS_OPEN)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    output = after("--output", words)
    for flag, value in (
        ("--input", tmp_path / "in.jsonl"),
        ("--output", tmp_path / "out"),
        ("--tokenizer", tmp_path),
    ):
        words = [*words[: words.index(flag) + 1], str(value), *words[words.index(flag) + 2 :]]
    assert main([*words, "--heldout", "0.2", "--workers", "1"]) == 0

    tokenizer = load_tokenizer(tmp_path)
    ends = [tokenizer.eos_id] if "template=default" in words else [*tokenizer.end_ids][::-1]
    info = read_dataset(tmp_path / "out")
    for row in Records(info, split="train"):
        # each answer is followed by the next document, or by padding
        last = row["is_maskable"] & ~np.append(row["is_maskable"][1:], False)
        for end in np.flatnonzero(last):
            assert row["tokens"][end + 1 - len(ends) : end + 1].tolist() == ends

    trained = {
        after("--config", other) for other in commands(prose_of(file)) if trains_on(other, output)
    }
    assert trained
    for name in trained:
        config = load_config(str(ROOT / name))
        opened = SimpleNamespace(start_step=0, rollbacks=SimpleNamespace(skipped=()))
        data = SimpleNamespace(sources=[(info, 1.0)])
        batch = next(open_batches(config, data, opened, [0, 1], copies=1))
        assert batch["is_maskable"].any()
        assert ("is_chosen" in batch) == (config.objective.name == "vrpo")


def test_the_scripts_of_the_page_write_dialogues_and_pairs(tmp_path, monkeypatch):
    library("yaml")
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "chatterbot_corpus/data/english"
    corpus.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    # answers: a number, a text before a turn without an answer, a text, and a list
    dialogues = [["How many?", 42], ["Hi", "Hello", "and then"], ["Who?", "An AI."], ["No", [1, 2]]]
    (corpus / "ai.yml").write_text(json.dumps({"conversations": dialogues}))  # which is YAML too
    write_dialogues, write_pairs = (compile(script, "finetuning.md", "exec") for script in SCRIPTS)

    exec(write_dialogues, {})
    lines = (tmp_path / "runs/chat.jsonl").read_text().splitlines()
    written = [json.loads(line)["messages"] for line in lines]
    assert [[(turn["role"], turn["content"]) for turn in turns] for turns in written] == [
        [("user", "How many?"), ("assistant", "42")],
        [("user", "Hi"), ("assistant", "Hello")],
        [("user", "Who?"), ("assistant", "An AI.")],
    ]
    exec(write_pairs, {})
    pairs = [json.loads(line) for line in (tmp_path / "runs/pairs.jsonl").read_text().splitlines()]
    assert pairs == [
        {"prompt": "Hi", "chosen": "hello", "rejected": "Hello"},
        {"prompt": "Who?", "chosen": "an ai.", "rejected": "An AI."},
    ]
