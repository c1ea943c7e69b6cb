"""`generate` of transformers: what it refuses, custom_generate, and streamers."""

import pytest
import torch
import transformers
from exported import MASK, expected

REQUEST = {"block_length": 8, "steps": 16}
IS_5 = int(transformers.__version__.split(".")[0]) >= 5


class Listener:
    """Notes what a streamer is given."""

    def __init__(self):
        self.given = []

    def put(self, value):
        self.given.append(("put", value))

    def put_draft(self, value):
        self.given.append(("draft", value))

    def end(self):
        self.given.append(("end", None))


class Words:
    """A tokenizer that writes ids as words."""

    def decode(self, ids, **settings):
        return "".join(f"<{int(i)}> " for i in ids)


def test_generate_alone_is_refused_with_what_to_call(model):
    for call in (model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(
            NotImplementedError, match=r"call model\.generate_diffusion.*custom_gen"
        ):
            call(torch.tensor([[1, 2]]), max_new_tokens=4)
    assert not model.can_generate()


def test_custom_generate_of_the_directory_is_generate_diffusion(model, directory):
    prompt = expected("gen_prompt").long()
    is_real = torch.ones_like(prompt)
    is_real[:, 0] = 0
    custom = {"custom_generate": str(directory), "trust_remote_code": True}
    if not IS_5:  # it has no custom_generate
        with pytest.raises(NotImplementedError, match="in transformers 5"):
            model.generate(prompt, **custom)
        return
    wanted = model.generate_diffusion(prompt, is_real, gen_length=32, commit="factor", **REQUEST)
    for inputs, length in (("inputs", "max_new_tokens"), ("input_ids", "gen_length")):
        given = {inputs: prompt, length: 32, "attention_mask": is_real, "commit": "factor"}
        assert torch.equal(model.generate(**given, **custom, **REQUEST), wanted)
    with pytest.raises(ValueError, match="Give the prompts once"):
        model.generate(prompt, input_ids=prompt, **custom)
    with pytest.raises(ValueError, match="max_new_tokens and gen_length are the same"):
        model.generate(prompt, max_new_tokens=4, gen_length=4, **custom)
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(prompt, num_beams=4, **custom)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(prompt, custom_generate=str(directory), trust_remote_code=False)


def test_a_streamer_sees_the_prompt_every_pass_and_every_block(model):
    prompt = expected("gen_prompt").long()[:1]
    listener = Listener()
    canvas = model.generate_diffusion(prompt, gen_length=16, streamer=listener, **REQUEST)
    kinds = [kind for kind, _ in listener.given]
    assert kinds == ["put", *["draft"] * 8, "put", *["draft"] * 8, "put", "end"]
    put = [value for kind, value in listener.given if kind == "put"]
    assert torch.equal(torch.cat(put, dim=1), canvas)
    drafts = [value for kind, value in listener.given if kind == "draft"]
    assert all(draft.shape == (1, 8) and not (draft == MASK).any() for draft in drafts)
    # the last draft of a block has become the block
    assert torch.equal(torch.cat([drafts[7], drafts[15]], dim=1), canvas[:, -16:])


def test_a_streamer_without_drafts_gets_the_blocks(model, capsys):
    prompt = expected("gen_prompt").long()[:1]
    streamer = transformers.TextStreamer(Words(), skip_prompt=True)
    canvas = model.generate_diffusion(prompt, gen_length=16, streamer=streamer, **REQUEST)
    shown = capsys.readouterr().out
    assert shown.split() == [f"<{i}>" for i in canvas[0, -16:].tolist()]


def test_the_streamer_of_transformers_5_shows_drafts(model, directory, capsys):
    if not IS_5:  # which it has not
        assert not hasattr(transformers, "TextDiffusionStreamer")
        return
    prompt = expected("gen_prompt").long()[:1]
    streamer = transformers.TextDiffusionStreamer(Words(), skip_prompt=True)
    custom = {"custom_generate": str(directory), "trust_remote_code": True}
    canvas = model.generate(prompt, max_new_tokens=16, streamer=streamer, **custom, **REQUEST)
    shown = capsys.readouterr().out
    # every draft is yellow, and erased by what follows
    assert shown.count("\033[33m") == shown.count("\0338\033[J") == 16
    left = shown
    while "\0337" in left:
        before, _, rest = left.partition("\0337")
        left = before + rest.partition("\0338\033[J")[2]
    assert left.split() == [f"<{i}>" for i in canvas[0, -16:].tolist()]
