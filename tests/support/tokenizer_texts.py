"""Texts that are hard on tokenizers, and what an export writes of a tokenizer."""

import lzma
import random
from pathlib import Path

import llada_jax
from llada_jax.hf.tokenizer_json import tokenizer_files

SCRIPTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.",
    "日本語のテキストをトークン化する。漢字とカタカナ。",
    "مرحبا بالعالم كيف حالك اليوم",
    "Привет, мир! Как твои дела?",
    "हिन्दी भाषा में लिखा हुआ",
    "한국어 문장을 씁니다",
    "def f(x):\n    return x  # comment\n\n\n\tindented\t\ttabs",
    "1234567890 3.14159 £18.50 -- == === ==== aaaa",
    "e\u0301a\u0300 café naïve ﬁ Å",
)
NASTY = (
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d",
    "\n",
    "\n\n\n",
    "\r\n\t\v\f",
    "\x00",
    "\x00\x00a\x01\x1b[0m\x7f",
    "\u2581",
    "a\u2581b \u2581\u2581 \n\u2581",
    "\ufeffmark",
    "\u200b\u200d\u00ad\u2028\u2029",
    "\ufffd",
    "\uffff\U0010ffff",
    "\U0001f600\U0001f469\u200d\U0001f52c\U0001f3f3\ufe0f\u200d\U0001f308",
    "e\u0301" * 9,
    "\u0301\u0301",
    "\u1112\u1161\u11ab",
    "=" * 777,
    "a" * 3001,
    " " * 1501 + "x",
    "\u00e9" * 401,
    "the " * 500,
    "日" * 300 + "\u2581" + "本" * 300,
)
LOOKALIKES = (
    "<mask>",
    "</s>",
    "<s>x</s>",
    "<pad><pad>",
    "<unk>",
    "a<mask>b",
    "<0x41>",
    "<0x0A><0xE2><0x96>",
    "<mask",
    "mask>",
)
ALPHABETS = (
    "".join(SCRIPTS),
    "ab \n\t=",
    " \u2581\n",
    "".join(map(chr, range(256))),
    "\U0001f600\u200d\u0301\ufe0f\U0001f3fd" + "日本",
)


# A chat template, as Jinja.
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{% endfor %}{% if "
    "add_generation_prompt %}[assistant]\n{% endif %}"
)

NOVELS = Path(llada_jax.__file__).parent / "data" / "austen6.txt.xz"


def training_texts() -> list[str]:
    """Returns enough text, with runs of one character in it, that pieces overlap in many ways."""
    with lzma.open(NOVELS, "rt") as file:
        novel = file.read(100_000)
    runs = [character * n for character in "=- a" for n in range(1, 9)]
    return [*SCRIPTS * 5, *runs * 5, novel]


def mixed_texts(num: int, seed: int = 0) -> list[str]:
    """Returns texts of all scripts in each other's company, none of which spells out a special
    token.
    """
    rng = random.Random(seed)
    texts = []
    while len(texts) < num:
        pieces = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                source = rng.choice(SCRIPTS)
                start = rng.randrange(len(source))
                pieces.append(source[start : start + rng.randrange(1, 40)])
            elif kind < 0.6:
                pieces.append(rng.choice(NASTY)[:50])
            elif kind < 0.9:
                pieces.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 60))))
            else:
                code = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                pieces.append(chr(code) * rng.randrange(1, 4))
        texts.append(rng.choice(["", " ", "\n"]).join(pieces))
    return texts


def write_tokenizer_files(tokenizer, directory, **kwargs):
    """Writes the tokenizer of an export into a new directory, and returns the directory."""
    directory.mkdir()
    for name, content in tokenizer_files(tokenizer, **{"max_length": 64, **kwargs}).items():
        (directory / name).write_bytes(content)
    return directory
