"""The tokenizer of an export in two versions of transformers, without this package."""

import json

import pytest
from support.tokenizer_texts import CHAT, LOOKALIKES, NASTY, mixed_texts, write_tokenizer_files
from support.transformers_versions import VERSIONS, run_python

KINDS = pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe"])


ENCODE = """
import json, sys
from transformers import AutoTokenizer
home, texts, out = sys.argv[1:]
texts = json.load(open(texts))
found = {}
for kind in ("bytes", "unigram", "bpe"):
    plain = AutoTokenizer.from_pretrained(f"{home}/{kind}")
    split = AutoTokenizer.from_pretrained(f"{home}/{kind}", split_special_tokens=True)
    ids = [plain(text)["input_ids"] for text in texts["mixed"]]
    found[kind] = {
        "mixed": ids,
        "decoded": [plain.decode(row, skip_special_tokens=True) for row in ids],
        "lookalikes": [plain(text)["input_ids"] for text in texts["lookalikes"]],
        "lookalikes_split": [split(text)["input_ids"] for text in texts["lookalikes"]],
        "special": [getattr(plain, f"{name}_token_id") for name in ("mask", "eos", "bos", "pad")],
        "length": len(plain),
        "is_fast": plain.is_fast,
        "padded": dict(plain(["a b", "longer text"], padding=True)),
    }
chat = AutoTokenizer.from_pretrained(f"{home}/chat")
turns = [{"role": "user", "content": "Hi"}]
found["chat"] = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
json.dump(found, open(out, "w"))
"""

TEXTS = [*mixed_texts(1000), *NASTY]


@pytest.fixture(scope="module", params=VERSIONS)
def in_transformers(request, ours, tmp_path_factory):
    """What one version of transformers makes of each kind of export, in a process without this
    package.
    """
    home = tmp_path_factory.mktemp("transformers")
    for kind, tokenizer in ours.items():
        write_tokenizer_files(tokenizer, home / kind)
    write_tokenizer_files(ours["bpe"], home / "chat", chat_template=CHAT)
    (home / "texts.json").write_text(json.dumps({"mixed": TEXTS, "lookalikes": LOOKALIKES}))
    run_python(request.param, ENCODE, home, home / "texts.json", home / "out.json", home=home)
    return json.loads((home / "out.json").read_text())


@pytest.mark.slow
@KINDS
def test_transformers_gives_the_same_ids_and_texts_on_a_thousand_texts(kind, ours, in_transformers):
    found, tokenizer = in_transformers[kind], ours[kind]
    assert found["mixed"] == tokenizer.encode_batch(TEXTS)
    assert found["decoded"] == TEXTS
    assert found["is_fast"]


@pytest.mark.slow
@KINDS
def test_transformers_knows_the_special_tokens_and_pads_on_the_left(kind, ours, in_transformers):
    found, tokenizer = in_transformers[kind], ours[kind]
    assert found["special"] == [
        tokenizer.mask_id,
        tokenizer.eos_id,
        tokenizer.bos_id,
        tokenizer.pad_id,
    ]
    assert found["length"] == tokenizer.vocab_size
    short, long = map(tokenizer.encode, ("a b", "longer text"))
    num_pads = len(long) - len(short)
    assert found["padded"]["input_ids"] == [[tokenizer.pad_id] * num_pads + short, long]
    assert found["padded"]["attention_mask"] == [[0] * num_pads + [1] * len(short), [1] * len(long)]


@pytest.mark.slow
@KINDS
def test_transformers_takes_a_spelled_out_special_token_for_one_unless_told_to_split_it(
    kind, ours, in_transformers
):
    found, tokenizer = in_transformers[kind], ours[kind]
    assert found["lookalikes_split"] == tokenizer.encode_batch(list(LOOKALIKES))
    read = dict(zip(LOOKALIKES, found["lookalikes"]))
    assert read["<mask>"] == [tokenizer.mask_id]
    assert read["a<mask>b"] == [*tokenizer.encode("a"), tokenizer.mask_id, *tokenizer.encode("b")]
    assert read["<0x41>"] == tokenizer.encode("<0x41>")


@pytest.mark.slow
def test_a_chat_template_comes_along(in_transformers):
    assert in_transformers["chat"] == "<s>[user]\nHi[assistant]\n"
