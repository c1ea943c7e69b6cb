"""How fast is a training step next to the same step in PyTorch, and to the peak of the device?

    python benchmarks/train_step.py [--size tiny 30m] [--cores 2] [--repeats 5] [--seconds 4]

It measures the first accelerator that JAX finds, and a CPU where there is none. Both libraries use
the same model, batch, loss (masked cross-entropy over p, averaged over all tokens), clipping and
AdamW; on a CPU all is float32, and on an accelerator the parameters are float32 and the products
bfloat16. llada_jax runs with its default knobs, and on a CPU with the huge pages for which
`llada-jax train` asks; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives them to PyTorch too. PyTorch
runs eagerly (as LLaDA's published guidelines write the step) and under torch.compile, both with
scaled_dot_product_attention. Before timing, PyTorch gets the parameters of llada_jax, and the
losses of one fixed corrupted batch must agree, so that both compute the same function. MFU counts
6 N + 12 L d T operations per token (llada_jax.models.flops) and the peak of the data sheet; the
peak of a CPU is measured in the same run, as the fastest float32 product of two large square
matrices in either library.

Each library runs in its own process. On a CPU all processes live at once and take turns, so that
other load on the machine affects all of them alike, and the median over the turns counts. On an
accelerator, whose memory they would share, one follows the other; a program that does not fit gets
a row that says so.

The machine must be idle. PyTorch's threads (OpenMP) spin while they wait for each other, so other
load slows PyTorch several times more than JAX. On a machine that is not idle, `--cores 1` and the
column of processor time still compare fairly.

It needs the dev extra and torch (2.13.0 was used); on GPUs the extra cuda and a torch for the same
CUDA. On TPUs it measures llada_jax alone. Prints a Markdown table.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

# {name: sizes of the network and of the batch}. The names of configs are their networks, with as
# many rows as PyTorch has memory for on 80 GB.
SIZES = {
    "tiny": {
        "vocab_size": 4096,
        "num_layers": 2,
        "d_model": 192,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 48,
        "d_ff": 512,
        "sequence_length": 64,
        "batch_size": 32,
    },
    "30m": {
        "vocab_size": 4096,
        "num_layers": 8,
        "d_model": 512,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 64,
        "d_ff": 1408,
        "sequence_length": 512,
        "batch_size": 4,
    },
    "llada_160m": {
        "vocab_size": 50_000,
        "num_layers": 12,
        "d_model": 768,
        "num_heads": 12,
        "num_kv_heads": 12,
        "head_dim": 64,
        "d_ff": 2048,
        "sequence_length": 2048,
        "batch_size": 16,
    },
    "llada_1b": {
        "vocab_size": 126_464,
        "num_layers": 22,
        "d_model": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 64,
        "d_ff": 5634,
        "sequence_length": 4096,
        "batch_size": 2,
    },
    # four layers of LLaDA-8B
    "llada_8b_wide": {
        "vocab_size": 126_464,
        "num_layers": 4,
        "d_model": 4096,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "d_ff": 12_288,
        "sequence_length": 4096,
        "batch_size": 4,
    },
}
CPU_SIZES = ("tiny", "30m")
ACCELERATOR_SIZES = ("llada_160m", "llada_1b", "llada_8b_wide")
WORKERS = ("llada_jax", "torch eager", "torch compile")
# What `llada-jax train` sets for itself (llada_jax/__main__.py).
SET_BY_TRAIN = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Asks which device the others will find; a process of its own, because it would keep the device.
ASKS_FOR_DEVICE = "device"
# How far the losses of the two libraries may lie apart, by the dtype of the products.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
P_MIN, NORM_EPS, THETA = 1e-3, 1e-5, 5e5


def make_batch(size: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens_BT, is_masked_BT and its probability p_mask_B, the same in every process."""
    rng = np.random.default_rng(0)
    B, T = size["batch_size"], size["sequence_length"]
    tokens_BT = rng.integers(0, size["vocab_size"] - 1, (B, T), dtype=np.int32)
    p_mask_B = ((1 - P_MIN) * (np.arange(B) + 0.5) / B + P_MIN).astype(np.float32)
    return tokens_BT, rng.random((B, T)) < p_mask_B[:, None], p_mask_B


# ---- the two sides


class JaxSide:
    """The train step of `llada-jax train`, compiled from a config with the default knobs."""

    def __init__(self, size: dict, dtype: str, variant: str):
        del variant
        import jax

        from llada_jax.cluster import sharding
        from llada_jax.config import default_config
        from llada_jax.training.state import create_state
        from llada_jax.training.step import compile_step, make_recipe

        self.jax, self.size = jax, size
        config = default_config()
        for name, value in size.items():
            group = config.data if name in ("sequence_length", "batch_size") else config.model
            group[name] = value
        config.model.dtype, config.model.rope_theta = dtype, THETA
        config.model.norm_eps, config.objective.eps = NORM_EPS, P_MIN
        config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = B1, B2, EPS
        config.optimizer.weight_decay, config.optimizer.clip_norm = WEIGHT_DECAY, CLIP
        config.schedule.name, config.schedule.warmup_steps = "constant", 0
        config.schedule.learning_rate, config.num_steps = LEARNING_RATE, 1
        tokenizer = SimpleNamespace(
            vocab_size=size["vocab_size"], mask_id=size["vocab_size"] - 1, bos_id=0
        )
        mesh = sharding.one_device_mesh()
        jax.set_mesh(mesh)
        recipe = make_recipe(config, tokenizer, mesh)
        self.model = recipe.model
        self.state = create_state(recipe.model, recipe.optimizer, recipe.abstract, seed=0)
        B, T = size["batch_size"], size["sequence_length"]
        # compiled by the first step, as torch.compile does
        self.compile = functools.partial(compile_step, recipe, (B, T))
        self.tokens_BT, self.is_masked_BT, self.p_mask_B = make_batch(size)
        ones_BT = np.ones((B, T), np.int32)
        batch = {
            "tokens": self.tokens_BT,
            "segment_ids": ones_BT,
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
            "is_maskable": ones_BT > 0,
        }
        self.batch = jax.device_put(batch, recipe.batch_sharding)

    @functools.cached_property
    def step(self) -> Callable:
        return self.compile()

    def check(self, path: str) -> float:
        """Saves the parameters to `path` and returns the loss of the fixed corrupted batch."""
        flat = self.jax.tree_util.tree_leaves_with_path(self.state.params)
        names = [self.jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in flat]
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, (_, leaf) in zip(names, flat)}
        np.savez(path, **arrays)
        noisy_BT = np.where(self.is_masked_BT, self.size["vocab_size"] - 1, self.tokens_BT)
        nll_fn = self.jax.jit(self.model.nll_fn)
        scores = nll_fn(
            self.state.params,
            noisy_BT,
            self.tokens_BT,
            self.is_masked_BT,
            self.batch["segment_ids"],
            self.batch["positions"],
        )
        return float(
            np.sum(np.asarray(scores.nll_BT, np.float64) / self.p_mask_B[:, None])
            / self.tokens_BT.size
        )

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.state, _ = self.step(self.state, self.batch)
        self.jax.block_until_ready(self.state)

    def peak_bytes(self, _: None) -> int:
        stats = self.jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else resident_bytes()

    def matmul(self, n: int):
        x = self.jax.device_put(np.random.default_rng(0).standard_normal((n, n), np.float32))
        product = self.jax.jit(lambda x: x @ x)
        return lambda: product(x).block_until_ready()


class TorchSide:
    """The same model and step in PyTorch, written as users of PyTorch write them."""

    def __init__(self, size: dict, dtype: str, variant: str, *, is_gpu: bool):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.torch, self.size = torch, size
        self.device = torch.device("cuda" if is_gpu else "cpu")
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        with self.device:
            self.net = make_torch_model(size)
        matrices = [p for p in self.net.parameters() if p.ndim > 1]
        norms = [p for p in self.net.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(B1, B2),
            eps=EPS,
            fused=True,
        )
        self.arrays = [torch.from_numpy(array).to(self.device) for array in make_batch(size)]
        is_eager = variant == "torch eager"
        self.loss = self.loss_of_masked if is_eager else torch.compile(self.loss_everywhere)

    def loss_of_masked(self, tokens_BT, is_masked_BT, p_mask_B):
        """As published: the cross-entropy of the masked positions only.

        The shapes depend on the mask, so this cannot be compiled.
        """
        logits_BTV = self.net(
            self.torch.where(is_masked_BT, self.size["vocab_size"] - 1, tokens_BT)
        )
        nll = self.torch.nn.functional.cross_entropy(
            logits_BTV[is_masked_BT], tokens_BT[is_masked_BT].long(), reduction="none"
        )
        return (
            nll / p_mask_B[:, None].expand_as(is_masked_BT)[is_masked_BT]
        ).sum() / tokens_BT.numel()

    def loss_everywhere(self, tokens_BT, is_masked_BT, p_mask_B):
        """The same with static shapes, for torch.compile."""
        logits_BTV = self.net(
            self.torch.where(is_masked_BT, self.size["vocab_size"] - 1, tokens_BT)
        )
        nll_BT = self.torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), tokens_BT.flatten().long(), reduction="none"
        ).view_as(tokens_BT)
        return (nll_BT * is_masked_BT / p_mask_B[:, None]).sum() / tokens_BT.numel()

    def check(self, path: str) -> float:
        load_parameters(self.net, np.load(path))
        with self.torch.no_grad(), self.autocast:
            return float(self.loss(*self.arrays))

    def run(self, num_steps: int) -> None:
        torch, tokens_BT = self.torch, self.arrays[0]
        draw = functools.partial(torch.rand, device=self.device)
        for _ in range(num_steps):
            p_mask_B = (1 - P_MIN) * draw(len(tokens_BT)) + P_MIN
            is_masked_BT = draw(tokens_BT.shape) < p_mask_B[:, None]
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast:
                loss = self.loss(tokens_BT, is_masked_BT, p_mask_B)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self, _: None) -> int:
        is_gpu = self.device.type == "cuda"
        return self.torch.cuda.max_memory_allocated() if is_gpu else resident_bytes()

    def matmul(self, n: int):
        x = self.torch.from_numpy(np.random.default_rng(0).standard_normal((n, n), np.float32))
        return lambda: x @ x


def make_torch_model(size: dict):
    """Returns the Transformer as an nn.Module.

    It has RMSNorm, rotate-half RoPE, bidirectional SDPA, SwiGLU and an untied head.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    D, H, V = size["d_model"], size["head_dim"], size["vocab_size"]
    N, K = size["num_heads"], size["num_kv_heads"]
    theta, eps = size.get("rope_theta", THETA), size.get("norm_eps", NORM_EPS)

    def rotate(x_BNTH, cos_TH, sin_TH):
        first, second = x_BNTH.chunk(2, dim=-1)
        return x_BNTH * cos_TH + torch.cat([-second, first], dim=-1) * sin_TH

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ff_norm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
            self.q, self.k, self.v = (nn.Linear(D, n * H, bias=False) for n in (N, K, K))
            self.attn_out = nn.Linear(N * H, D, bias=False)
            self.ff_gate, self.ff_up = (nn.Linear(D, size["d_ff"], bias=False) for _ in range(2))
            self.ff_out = nn.Linear(size["d_ff"], D, bias=False)

        def forward(self, x_BTD, cos_TH, sin_TH):
            y_BTD = self.attn_norm(x_BTD)
            q, k, v = (
                w(y_BTD).unflatten(-1, (-1, H)).transpose(1, 2) for w in (self.q, self.k, self.v)
            )
            # rotary positions are float32; v has the dtype of the products
            q, k = (rotate(x, cos_TH, sin_TH).to(v.dtype) for x in (q, k))
            out_BNTH = F.scaled_dot_product_attention(q, k, v, enable_gqa=K != N)
            x_BTD = x_BTD + self.attn_out(out_BNTH.transpose(1, 2).flatten(2))
            y_BTD = self.ff_norm(x_BTD)
            return x_BTD + self.ff_out(F.silu(self.ff_gate(y_BTD)) * self.ff_up(y_BTD))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, D)
            self.blocks = nn.ModuleList(Block() for _ in range(size["num_layers"]))
            self.final_norm = nn.RMSNorm(D, eps=eps)
            self.lm_head = nn.Linear(D, V, bias=False)
            frequency = theta ** (-torch.arange(0, H, 2, dtype=torch.float32) / H)
            angle_TH = torch.outer(torch.arange(size["sequence_length"]).float(), frequency).repeat(
                1, 2
            )
            self.register_buffer("cos_TH", angle_TH.cos())
            self.register_buffer("sin_TH", angle_TH.sin())

        def forward(self, tokens_BT):
            x_BTD = self.embed(tokens_BT)
            for block in self.blocks:
                x_BTD = block(x_BTD, self.cos_TH, self.sin_TH)
            return self.lm_head(self.final_norm(x_BTD))

    return Transformer()


def load_parameters(net, arrays) -> None:
    """Copies the parameters of llada_jax into the PyTorch model.

    In llada_jax, layers are stacked on the first dim and kernels are [in, out].
    """
    import torch

    def as_linear(array, num_inputs):  # [in..., out...] -> [out, in]
        return array.reshape(num_inputs, -1).T

    D = net.embed.weight.shape[1]
    state = {
        "embed.weight": arrays["embed"],
        "final_norm.weight": arrays["final_norm"],
        "lm_head.weight": as_linear(arrays["lm_head"], D),
    }
    for name in (name for name in arrays.files if name.startswith("blocks/")):
        short = name.removeprefix("blocks/")
        for layer, array in enumerate(arrays[name]):
            num_inputs = {"attn_out": math.prod(array.shape[:-1]), "ff_out": array.shape[0]}.get(
                short, D
            )
            weight = array if short.endswith("norm") else as_linear(array, num_inputs)
            state[f"blocks.{layer}.{short}.weight"] = weight
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    net.load_state_dict({**net.state_dict(), **tensors})


# ---- processes in turns


def serve(name: str, size: dict, dtype: str) -> None:
    """Runs as a worker: answers every line on stdin with one line of JSON, until stdin ends."""
    if name.startswith("llada_jax"):
        side: Any = JaxSide(size, dtype, name)
    else:
        side = TorchSide(size, dtype, name, is_gpu=os.environ.get("JAX_PLATFORMS") != "cpu")
    for line in sys.stdin:
        request, argument = json.loads(line)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        if request == "matmul":
            multiply = side.matmul(argument)
            multiply()
            answer = max(2 * argument**3 / timed(multiply) for _ in range(5))
        else:
            answer = getattr(side, request)(argument)
        print(
            json.dumps([answer, time.perf_counter() - begin, time.process_time() - cpu_begin]),
            flush=True,
        )


def timed(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def resident_bytes() -> int:
    """Returns the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device() -> dict:
    """Returns platform ("cpu", "gpu" or "tpu"), kind and peak FLOP/s (None: not in the table) of
    the device that JAX finds.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--worker", ASKS_FOR_DEVICE],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_device() -> None:
    """Runs as the process that `device` asks."""
    import jax

    from llada_jax.cluster import hardware

    found = jax.local_devices()[0]
    peak = hardware.peak_flops(found)
    print(json.dumps({"platform": found.platform, "kind": found.device_kind, "peak": peak}))


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


class WorkerEnded(Exception):
    """A worker process has ended by itself; its error is printed above."""


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, name: str, size_name: str, *, num_cores: int, dtype: str, is_cpu: bool):
        self.process = subprocess.Popen(
            [
                *(sys.executable, __file__, "--worker", name, "--size", size_name),
                *("--cores", str(num_cores), "--dtype", dtype),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(
                **({"JAX_PLATFORMS": "cpu"} if is_cpu else {}),
                **(SET_BY_TRAIN if name == "llada_jax" else {}),
            ),
        )

    def ask(self, request: str, argument=None):
        """Returns (answer, seconds, seconds of processor time over all cores).

        Raises:
            WorkerEnded: it has failed.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps([request, argument]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerEnded(request) from error
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEnded(request)
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # a worker that has ended leaves a pipe that cannot be flushed
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Measured(NamedTuple):
    """What one program has shown. loss: of the fixed batch. first_s: of the first step."""

    loss: float
    first_s: float
    step_s: list[float]
    cpu_s: list[float]
    peak_bytes: int
    matmul_flops: float  # of a CPU; 0 elsewhere


def take_turns(
    names: tuple[str, ...], parameters: str, *, make: Callable, repeats: int, seconds: float
) -> dict[str, Measured]:
    """Returns what the programs show, all of which live at once and take turns.

    Args:
        parameters: path of the file that llada_jax writes and PyTorch reads.
        make: name -> Worker.

    Raises:
        WorkerEnded: one of them has failed.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(make(name)) for name in names}
        losses = {name: worker.ask("check", parameters)[0] for name, worker in workers.items()}
        first = {name: worker.ask("run", 1)[1] for name, worker in workers.items()}
        steps = {
            name: max(1, round(seconds / worker.ask("run", 1)[1]))
            for name, worker in workers.items()
        }
        turns = defaultdict(list)
        peaks = dict.fromkeys(names, 0.0)
        for turn in range(repeats):
            for name in names if turn % 2 == 0 else names[::-1]:
                _, wall, cpu = workers[name].ask("run", steps[name])
                turns[name].append((wall / steps[name], cpu / steps[name]))
            if len(names) > 1:  # a CPU, whose peak no table has
                for name in names:
                    peaks[name] = max(peaks[name], workers[name].ask("matmul", 2048)[0])
        memory = {name: worker.ask("peak_bytes")[0] for name, worker in workers.items()}
    return {
        name: Measured(
            losses[name],
            first[name],
            [wall for wall, _ in turns[name]],
            [cpu for _, cpu in turns[name]],
            memory[name],
            peaks[name],
        )
        for name in names
    }


def measure(
    size_name: str, found: dict, *, num_cores: int, repeats: int, seconds: float, dtype: str
) -> str:
    """Returns the Markdown table for one size; `found` is what `device` returns."""
    from llada_jax.models.flops import flops_per_token
    from llada_jax.models.transformer import Architecture, num_matmul_parameters, num_parameters
    from llada_jax.units import format_bytes, format_count

    size, is_cpu = SIZES[size_name], found["platform"] == "cpu"
    B, T = size["batch_size"], size["sequence_length"]
    sizes: dict[str, Any] = {
        name: size[name] for name in size if name not in ("batch_size", "sequence_length")
    }
    a = Architecture(**sizes)
    flops = flops_per_token(num_matmul_parameters(a), a.num_layers, a.num_heads * a.head_dim, T)
    names = WORKERS[:1] if found["platform"] == "tpu" else WORKERS
    make = lambda name: Worker(name, size_name, num_cores=num_cores, dtype=dtype, is_cpu=is_cpu)  # noqa: E731
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as directory:
        parameters = os.path.join(directory, "parameters.npz")
        for group in (names,) if is_cpu else [(name,) for name in names]:
            try:
                measured = take_turns(
                    group, parameters, make=make, repeats=repeats, seconds=seconds
                )
                results |= measured
                for name, result in measured.items():
                    # at once, because compiling takes minutes and the table comes last
                    step_s = statistics.median(result.step_s)
                    print(f"{size_name}, {name}: {1000 * step_s:,.1f} ms/step", file=sys.stderr)
            except WorkerEnded:
                if "llada_jax" in group:
                    raise SystemExit("a worker has failed; its error is printed above") from None
    ours = results["llada_jax"]
    for name, result in results.items():
        if not math.isclose(result.loss, ours.loss, rel_tol=TOLERANCE[dtype]):
            raise SystemExit(
                f"not the same model: loss {result.loss} in {name}, {ours.loss} in llada_jax"
            )

    best_torch = min(
        (statistics.median(r.step_s) for name, r in results.items() if name != "llada_jax"),
        default=None,
    )
    peak = found["peak"] or max(r.matmul_flops for r in results.values())
    origin = "from the data sheet" if found["peak"] else "measured"
    shape = ", ".join(f"{key} {value}" for key, value in size.items())
    lines = [
        f"### {size_name}: {format_count(num_parameters(a))} parameters",
        "",
        f"{shape}; {format_count(flops)} FLOP/token; {dtype}, peak {origin}: "
        f"{peak / 1e12:.3g} TFLOP/s; same loss {ours.loss:.5f}; {repeats} turns.",
        "",
        "| | ms/step median (min to max) | tokens/s | TFLOP/s | MFU | peak memory | CPU s/step | "
        "relative to the better PyTorch | first step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if name not in results:
            lines.append(f"| {name} | failed: see its error |{' |' * 7}")
            continue
        result = results[name]
        median = statistics.median(result.step_s)
        rate = B * T / median
        low, high = 1000 * min(result.step_s), 1000 * max(result.step_s)
        cells = [
            name,
            f"{1000 * median:,.1f} ({low:,.1f} to {high:,.1f})",
            f"{rate:,.0f}",
            f"{rate * flops / 1e12:.3g}",
            f"{rate * flops / peak:.1%}" if peak else "?",
            format_bytes(result.peak_bytes),
            f"{statistics.median(result.cpu_s):.3f}",
            f"{best_torch / median:.2f}x" if best_torch else "",
            f"{result.first_s:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Returns the name of the processor, its number of cores and the versions of the libraries."""
    import importlib.metadata

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = [
        f"{found.name} {found.version}"
        for found in importlib.metadata.distributions()
        if found.name in ("jax", "torch")
    ]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {', '.join(sorted(versions))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--size",
        nargs="+",
        choices=SIZES,
        help=f"default: {' '.join(CPU_SIZES)} on a CPU, {' '.join(ACCELERATOR_SIZES)} elsewhere",
    )
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="cores that each library may use"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of each library; the median counts"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="approximate length of a turn")
    parser.add_argument(
        "--dtype",
        choices=TOLERANCE,
        help="of the products; default: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--worker", choices=(*WORKERS, ASKS_FOR_DEVICE), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == ASKS_FOR_DEVICE:
        print_device()
        return
    if arguments.worker:
        # Before a library counts the cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        serve(arguments.worker, SIZES[arguments.size[0]], arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as directory:
        # not the one that all programs share: a killed one can leave it damaged
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        print_tables(arguments)


def print_tables(arguments: argparse.Namespace) -> None:
    found = device()
    is_cpu = found["platform"] == "cpu"
    print(f"Machine: {found['kind']}; {machine()}; each library may use {arguments.cores}.\n")
    if is_cpu and os.getloadavg()[0] > 0.5:
        print(
            f"NOTE: the load average is {os.getloadavg()[0]:.1f}, so this machine is not idle, "
            "from which PyTorch suffers more than JAX.\n"
        )
    for size_name in arguments.size or (CPU_SIZES if is_cpu else ACCELERATOR_SIZES):
        print(
            measure(
                size_name,
                found,
                num_cores=arguments.cores,
                repeats=arguments.repeats,
                seconds=arguments.seconds,
                dtype=arguments.dtype or ("float32" if is_cpu else "bfloat16"),
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
