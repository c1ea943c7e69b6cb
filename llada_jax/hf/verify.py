"""Whether an export computes what the checkpoint computes: PyTorch answers, in a process that has
never seen this package.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from etils import epath

from llada_jax.data.records import JSON_NAME, Records, read_dataset
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.errors import NumericsError, UserError
from llada_jax.hf.write import DTYPES
from llada_jax.masks import Mask
from llada_jax.models.model import make_model
from llada_jax.models.transformer import Architecture

# rows, and positions per row, whose logits are compared
COMPARED = (4, 64)
# Nats per token by which the distributions may differ: what rounding the weights costs.
MAX_KL = {"float32": 1e-6, "bfloat16": 5e-2}
# Share of the largest logit by which those of PyTorch may differ from ours with the weights rounded
# alike.
MAX_DIFFERENCE = 1e-3

LOGITS = """
import sys
for name in ("llada_jax", "jax", "flax"):
    sys.modules[name] = None  # an import of it fails
import numpy as np, torch
from transformers import AutoModelForCausalLM
directory, tokens, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).float().eval()
tokens_BT = torch.from_numpy(np.load(tokens).astype(np.int64))
with torch.no_grad():
    # one row after the other: a batch would need the memory of all of them
    rows = [model(tokens_1T).logits[0].numpy() for tokens_1T in tokens_BT.split(1)]
np.save(logits, np.stack(rows))
"""


def tokens_to_compare(directory: str | None, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Returns int32 tokens [B, T], every second one masked, and where they come from: "held-out" or
    "random".

    Args:
        directory: of a dataset that the run was trained on, whose held-out text is used if it is
            still there and was written with this tokenizer. None: there is none.
    """
    B, T = COMPARED
    rng = np.random.default_rng(0)
    tokens_BT, origin = rng.integers(tokenizer.vocab_size, size=(B, T), dtype=np.int32), "random"
    stream = (
        np.zeros(0, np.int32)
        if directory is None
        else _heldout_tokens(directory, tokenizer, size=B * T)
    )
    if len(stream) >= B * T:
        tokens_BT, origin = stream[: B * T].reshape(B, T).astype(np.int32), "held-out"
    is_masked_BT = rng.random((B, T)) < 0.5
    return np.where(is_masked_BT, tokenizer.mask_id, tokens_BT).astype(np.int32), origin


def _heldout_tokens(directory: epath.PathLike, tokenizer: Tokenizer, *, size: int) -> np.ndarray:
    """Returns at least `size` tokens of held-out text, or fewer where there are not as many."""
    folder = epath.Path(directory)
    if not (folder / JSON_NAME).exists():
        return np.zeros(0, np.int32)
    info = read_dataset(folder)
    if "heldout" not in info.splits or info.tokenizer["fingerprint"] != tokenizer.fingerprint:
        return np.zeros(0, np.int32)
    rows = Records(info, split="heldout")
    stream = [np.zeros(0, np.int32)]
    for i in range(len(rows)):
        record = rows[i]
        stream.append(record["tokens"][record["segment_ids"] > 0])
        if sum(map(len, stream)) >= size:
            break
    return np.concatenate(stream)


def compare_with_torch(
    directory: Path,
    a: Architecture,
    params: dict,
    tokens_BT: np.ndarray,
    *,
    mask: Mask,
    dtype: str,
) -> dict[str, float]:
    """Returns how far PyTorch's logits of an export are from those of our parameters.

    Args:
        directory: the export.
        params: float32, of the checkpoint.
        tokens_BT: what both are asked.
        mask: what attention saw in training.
        dtype: of the weights in the export.

    Returns:
        As `compare`.

    Raises:
        NumericsError: too far, or the export cannot be loaded.
    """
    model = make_model(a, attention="xla", mask=mask)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)

    @jax.jit
    def logits(params):
        return model.logits_fn(params, tokens_BT, np.ones_like(tokens_BT), positions_BT)

    # Two numbers are wanted. With the weights rounded as in the files, ours and PyTorch's must
    # agree closely, or the network is another one; against the exact weights, the difference is
    # what rounding costs. Accelerators multiply in lower precision by default, which would hide
    # the first.
    with jax.default_matmul_precision("highest"):
        ours_BTV = np.asarray(logits(params))
        rounded = jax.tree.map(
            lambda leaf: leaf.astype(DTYPES[dtype][1]).astype(leaf.dtype), params
        )
        rounded_BTV = np.asarray(logits(rounded))
    # PyTorch is about to hold the model too.
    del params, rounded
    found = compare(ours_BTV, rounded_BTV, torch_logits(directory, tokens_BT))
    check(found, dtype=dtype)
    return found


def torch_logits(directory, tokens_BT: np.ndarray) -> np.ndarray:
    """Returns float32 logits [B, T, V] of an exported directory, computed in float32 by
    transformers in a fresh process.

    Raises:
        NumericsError: it cannot be loaded there.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # transformers 4.49 takes no dot in the name
        (scratch / "model").symlink_to(Path(directory).resolve())
        np.save(scratch / "tokens.npy", tokens_BT)
        environment = {
            **os.environ,
            "HF_HOME": str(scratch / "hf"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        words = [str(scratch / name) for name in ("model", "tokens.npy", "logits.npy")]
        done = subprocess.run(
            [sys.executable, "-c", LOGITS, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            if "ModuleNotFoundError: No module named" in last[0]:
                raise UserError(
                    f"--verify loads the export with PyTorch ({last[0].partition(': ')[2]}): pip "
                    "install 'llada_jax[torch]'."
                )
            raise NumericsError(
                f"transformers cannot load {directory} ({last[0]}); nothing was kept."
            )
        return np.load(scratch / "logits.npy")


def compare(
    ours_BTV: np.ndarray, rounded_BTV: np.ndarray, theirs_BTV: np.ndarray
) -> dict[str, float]:
    """Returns how far PyTorch's logits are from ours.

    Args:
        ours_BTV: of the checkpoint. rounded_BTV: of its weights rounded to the dtype of the export.
            theirs_BTV: PyTorch's.

    Returns:
        max_difference: of theirs and rounded. relative_difference: the same as a share of the
            largest logit.
        kl_nats: KL(checkpoint || export) of the distributions at one position, mean over positions.
    """
    log_p, log_q = _log_softmax(ours_BTV), _log_softmax(theirs_BTV)
    difference = float(np.abs(theirs_BTV - rounded_BTV).max())
    return {
        "max_difference": difference,
        "relative_difference": difference / max(1.0, float(np.abs(rounded_BTV).max())),
        "kl_nats": max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())),
    }


def check(found: dict[str, float], *, dtype: str) -> None:
    """Raises NumericsError when an export is not the model that the checkpoint is."""
    if not found["relative_difference"] <= MAX_DIFFERENCE:
        raise NumericsError(
            f"PyTorch's logits differ from ours by up to {found['max_difference']:.3g}, "
            f"{found['relative_difference']:.1e} of the largest, more than {MAX_DIFFERENCE:g}: the "
            "export is not the checkpoint's network; nothing was kept."
        )
    if not found["kl_nats"] <= MAX_KL[dtype]:
        raise NumericsError(
            f"Rounding to {dtype} moves the predicted distribution by {found['kl_nats']:.3g} "
            f"nats per token, more than {MAX_KL[dtype]:g}; export with --dtype float32; "
            "nothing was kept."
        )


def _log_softmax(logits_BTV: np.ndarray) -> np.ndarray:
    logits_BTV = logits_BTV.astype(np.float64)
    logits_BTV -= logits_BTV.max(-1, keepdims=True)
    return logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
