"""How fast is a training step next to the same step in PyTorch, and next to this CPU's peak?

    python benchmarks/train_step.py [--size tiny 30m] [--cores 2] [--repeats 5] [--seconds 4]

Both use the same model, batch, loss (masked cross-entropy over p, averaged over all tokens),
clipping and AdamW, in float32 on the CPU. Each library runs in its own process; all processes live
at once and take turns, so that other load on the machine affects all of them alike, and the median
over the turns counts. PyTorch runs eagerly (as LLaDA's published guidelines write the step) and
under torch.compile. Before timing, PyTorch gets the parameters of llada_jax, and the losses of one
fixed corrupted batch must agree to 1e-4 relative, so that both compute the same function. The peak
is measured in the same run: it is the fastest float32 product of two large square matrices in
either library.

The machine must be idle. PyTorch's threads (OpenMP) spin while they wait for each other, so other
load slows PyTorch several times more than JAX. On a machine that is not idle, `--cores 1` and the
column of processor time still compare fairly.

It needs the dev extra and torch (2.13.0 was used). Prints a Markdown table.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# "tiny" is the network of configs/tiny.py.
SIZES = {
    "tiny": {
        "vocab_size": 4096,
        "num_layers": 2,
        "d_model": 192,
        "num_heads": 4,
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
        "head_dim": 64,
        "d_ff": 1408,
        "sequence_length": 512,
        "batch_size": 4,
    },
}
WORKERS = ("llada_jax", "llada_jax remat=dots", "torch eager", "torch compile")
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
P_MIN, NORM_EPS, THETA = 1e-3, 1e-5, 5e5


def make_batch(size: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens_BT, is_masked_BT and its probability p_mask_B, the same in every process."""
    rng = np.random.default_rng(0)
    B, T = size["batch_size"], size["sequence_length"]
    tokens_BT = rng.integers(0, size["vocab_size"] - 1, (B, T), dtype=np.int32)
    p_mask_B = ((1 - P_MIN) * (np.arange(B) + 0.5) / B + P_MIN).astype(np.float32)
    return tokens_BT, rng.random((B, T)) < p_mask_B[:, None], p_mask_B


# ------------------------------------------------------------------------------------ the two sides


class JaxSide:
    """The train step of `llada-jax train`: the same model, objective, optimizer and state."""

    def __init__(self, size: dict, variant: str):
        import jax

        from llada_jax.cluster import sharding
        from llada_jax.models.model import make_model
        from llada_jax.models.transformer import Architecture
        from llada_jax.objectives.masked_diffusion import masked_diffusion
        from llada_jax.training import optim
        from llada_jax.training.state import abstract_metrics, abstract_state, create_state
        from llada_jax.training.step import make_train_step

        self.jax, self.size = jax, size
        sizes = {
            name: value
            for name, value in size.items()
            if name not in ("sequence_length", "batch_size")
        }
        architecture = Architecture(
            **sizes, num_kv_heads=size["num_heads"], rope_theta=THETA, norm_eps=NORM_EPS
        )
        schedule = optim.make_schedule(
            name="constant",
            learning_rate=LEARNING_RATE,
            warmup_steps=0,
            final_learning_rate=0.0,
            decay_fraction=0.0,
            decay_shape="linear",
            stages=(),
            num_steps=1,
            tokens_per_step=1,
        )
        optimizer = optim.make_optimizer(
            schedule,
            name="adamw",
            b1=B1,
            b2=B2,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            weight_decay_multipliers=((".*norm.*", 0.0), (".*", 1.0)),
            learning_rate_multipliers=((".*", 1.0),),
            clip_norm=CLIP,
        )
        objective = masked_diffusion(mask_id=size["vocab_size"] - 1, eps=P_MIN)
        self.model = make_model(
            architecture,
            remat=variant.partition("remat=")[2] or "none",
            # that of config.model, because a batch of a benchmark is not to decide it
            nll_chunk=1024,
            capacity=objective.capacity,
        )
        B, T = size["batch_size"], size["sequence_length"]
        jax.set_mesh(sharding.one_device_mesh())
        metrics = abstract_metrics(objective, self.model.abstract, num_rows=B, sequence_length=T)
        abstract = abstract_state(
            self.model, optimizer, self._mesh(), metrics=metrics, keep_ema=False
        )
        self.state = create_state(self.model, optimizer, abstract, seed=0)
        train_step = make_train_step(
            objective,
            self.model.nll_fn,
            optimizer,
            schedule,
            seed=0,
            num_rows=B,
            num_microbatches=1,
            ema_decay=0.0,
        )
        self.step = jax.jit(train_step, donate_argnums=0)
        self.tokens_BT, self.is_masked_BT, self.p_mask_B = make_batch(size)
        ones_BT = np.ones((B, T), np.int32)
        positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        batch = {
            "tokens": self.tokens_BT,
            "segment_ids": ones_BT,
            "positions": positions_BT,
            "is_maskable": ones_BT > 0,
        }
        self.batch = jax.device_put(batch)

    def _mesh(self):
        return self.jax.sharding.get_mesh()

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
            self.state = self.step(self.state, self.batch)
        self.jax.block_until_ready(self.state)

    def matmul(self, n: int):
        x = self.jax.device_put(np.random.default_rng(0).standard_normal((n, n), np.float32))
        product = self.jax.jit(lambda x: x @ x)
        return lambda: product(x).block_until_ready()


class TorchSide:
    """The same model and step in PyTorch, written as users of PyTorch write them."""

    def __init__(self, size: dict, variant: str):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.torch, self.size, self.variant = torch, size, variant
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
        self.arrays = [torch.from_numpy(array) for array in make_batch(size)]
        loss = (
            self.loss_of_masked if variant == "torch eager" else torch.compile(self.loss_everywhere)
        )
        self.loss = loss

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
        with self.torch.no_grad():
            return float(self.loss(*self.arrays))

    def run(self, num_steps: int) -> None:
        torch, tokens_BT = self.torch, self.arrays[0]
        for _ in range(num_steps):
            p_mask_B = (1 - P_MIN) * torch.rand(len(tokens_BT)) + P_MIN
            is_masked_BT = torch.rand(tokens_BT.shape) < p_mask_B[:, None]
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(tokens_BT, is_masked_BT, p_mask_B).backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            self.optimizer.step()

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

    D, N, H, V = size["d_model"], size["num_heads"], size["head_dim"], size["vocab_size"]

    def rotate(x_BNTH, cos_TH, sin_TH):
        first, second = x_BNTH.chunk(2, dim=-1)
        return x_BNTH * cos_TH + torch.cat([-second, first], dim=-1) * sin_TH

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ff_norm = nn.RMSNorm(D, eps=NORM_EPS), nn.RMSNorm(D, eps=NORM_EPS)
            self.q, self.k, self.v = (nn.Linear(D, N * H, bias=False) for _ in range(3))
            self.attn_out = nn.Linear(N * H, D, bias=False)
            self.ff_gate, self.ff_up = (nn.Linear(D, size["d_ff"], bias=False) for _ in range(2))
            self.ff_out = nn.Linear(size["d_ff"], D, bias=False)

        def forward(self, x_BTD, cos_TH, sin_TH):
            y_BTD = self.attn_norm(x_BTD)
            q, k, v = (
                w(y_BTD).unflatten(-1, (N, H)).transpose(1, 2) for w in (self.q, self.k, self.v)
            )
            out_BNTH = F.scaled_dot_product_attention(
                rotate(q, cos_TH, sin_TH), rotate(k, cos_TH, sin_TH), v
            )
            x_BTD = x_BTD + self.attn_out(out_BNTH.transpose(1, 2).flatten(2))
            y_BTD = self.ff_norm(x_BTD)
            return x_BTD + self.ff_out(F.silu(self.ff_gate(y_BTD)) * self.ff_up(y_BTD))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, D)
            self.blocks = nn.ModuleList(Block() for _ in range(size["num_layers"]))
            self.final_norm = nn.RMSNorm(D, eps=NORM_EPS)
            self.lm_head = nn.Linear(D, V, bias=False)
            frequency = THETA ** (-torch.arange(0, H, 2, dtype=torch.float32) / H)
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


# ------------------------------------------------------------------------------- processes in turns


def serve(name: str, size: dict) -> None:
    """Runs as a worker: answers every line on stdin with one line of JSON, until stdin ends."""
    side = (JaxSide if name.startswith("llada_jax") else TorchSide)(size, name)
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


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, name: str, size_name: str, num_cores: int):
        root = Path(__file__).resolve().parents[1]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                name,
                "--size",
                size_name,
                "--cores",
                str(num_cores),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: str, argument):
        """Returns (answer, seconds, seconds of processor time over all cores)."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([request, argument]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended during {request!r}; its error is printed above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(size_name: str, *, num_cores: int, repeats: int, seconds: float) -> str:
    """Returns the Markdown table for one size."""
    from llada_jax.models.flops import flops_per_token
    from llada_jax.units import format_count

    size = SIZES[size_name]
    d_attention = size["num_heads"] * size["head_dim"]
    per_layer = size["d_model"] * (4 * d_attention + 3 * size["d_ff"])
    num_matmul = size["num_layers"] * per_layer + size["d_model"] * size["vocab_size"]
    flops = flops_per_token(num_matmul, size["num_layers"], d_attention, size["sequence_length"])
    tokens = size["batch_size"] * size["sequence_length"]

    workers = {name: Worker(name, size_name, num_cores) for name in WORKERS}
    with tempfile.TemporaryDirectory() as directory:
        parameters = os.path.join(directory, "parameters.npz")
        losses = {name: worker.ask("check", parameters)[0] for name, worker in workers.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["llada_jax"], rel_tol=1e-4):
            raise SystemExit(
                f"not the same model: loss {loss} in {name}, {losses['llada_jax']} in llada_jax"
            )
    first = {name: worker.ask("run", 1)[1] for name, worker in workers.items()}  # compiles
    steps = {
        name: max(1, round(seconds / worker.ask("run", 1)[1])) for name, worker in workers.items()
    }
    step_s, cpu_s = {name: [] for name in WORKERS}, {name: [] for name in WORKERS}
    peaks = []
    for turn in range(repeats):
        for name in WORKERS if turn % 2 == 0 else WORKERS[::-1]:
            _, wall, cpu = workers[name].ask("run", steps[name])
            step_s[name].append(wall / steps[name])
            cpu_s[name].append(cpu / steps[name])
        peaks += [workers[name].ask("matmul", 2048)[0] for name in ("llada_jax", "torch eager")]
    for worker in workers.values():
        worker.close()

    median = {name: statistics.median(values) for name, values in step_s.items()}
    best_torch = min(median["torch eager"], median["torch compile"])
    num_parameters = num_matmul + size["d_model"] * size["vocab_size"]
    shape = ", ".join(f"{key} {value}" for key, value in size.items())
    lines = [
        f"### {size_name}: {format_count(num_parameters)} parameters",
        "",
        f"{shape}; {format_count(flops)} FLOP/token; measured float32 peak {max(peaks) / 1e9:.0f} "
        f"GFLOP/s (JAX {max(peaks[::2]) / 1e9:.0f}, PyTorch {max(peaks[1::2]) / 1e9:.0f}); same "
        f"loss {losses['llada_jax']:.5f}; {repeats} turns.",
        "",
        "| | tokens/s | s/step median (min to max) | CPU s/step | share of peak | of the better "
        "PyTorch | first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in WORKERS:
        rate = tokens / median[name]
        spread = f"{min(step_s[name]):.3f} to {max(step_s[name]):.3f}"
        cells = [
            name,
            f"{rate:,.0f}",
            f"{median[name]:.3f} ({spread})",
            f"{statistics.median(cpu_s[name]):.3f}",
            f"{rate * flops / max(peaks):.0%}",
            f"{best_torch / median[name]:.2f}x",
            f"{first[name]:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Returns the name of the processor, its number of cores and the versions of the libraries."""
    import importlib.metadata

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="cores that each library may use"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of each library; the median counts"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="approximate length of a turn")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        # Before a library counts the cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        serve(arguments.worker, SIZES[arguments.size[0]])
        return
    print(f"Machine: {machine()}; each library may use {arguments.cores}.\n")
    if os.getloadavg()[0] > 0.5:
        print(
            f"NOTE: the load average is {os.getloadavg()[0]:.1f}, so this machine is not idle, "
            "from which PyTorch suffers more than JAX.\n"
        )
    for size_name in arguments.size:
        print(
            measure(
                size_name,
                num_cores=arguments.cores,
                repeats=arguments.repeats,
                seconds=arguments.seconds,
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
