"""`llada-jax plan`: what a config needs on a machine that is not there: memory, time, cost, and the compiled program.

The arithmetic is exact where it can be (parameters, state, FLOPs) and stated with its assumptions where it cannot
(activations, time). `--compile` asks the compiler instead: it builds the very train step that `llada-jax train` would run.
"""

import itertools
import json
import math
import sys

import jax

from llada_jax import aot, hardware, sharding
from llada_jax import metrics as measure
from llada_jax.command_line import Parser
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.hardware import Slice
from llada_jax.metrics import format_bytes, format_count, format_seconds
from llada_jax.models.attention import choose
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.recipe import Recipe, make_recipe

REMATS = ("none", "dots", "attention", "full")  # from the most memory to the most recomputation

# What fraction of the peak the executed FLOPs reach, recomputation included. Published dense models of 7B to 70B reach
# 40 to 70% of the peak in model FLOPs, with up to a third recomputed on top (MaxText's README and tpu-recipes).
EFFICIENCY = {"slow": 0.45, "fast": 0.75}


def main(argv: list[str]) -> None:
    parser = Parser(
        "plan",
        "Tells memory, time and cost of a config on TPU slices or GPUs that need not be there.",
        "llada-jax plan --config configs/llada_8b.py --topology v5p-128 --compile",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="Python file with get_config()")
    parser.add_argument("--topology", required=True, metavar="NAME", help="TPU slice (v5p-128) or GPUs (64xh100)")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="of that topology, joined by the network")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="V", help="if config.model.vocab_size is 0")
    parser.add_argument("--compile", action="store_true", help="ask libtpu's compiler too; takes minutes")
    parser.add_argument("--search", action="store_true", help="try other meshes, remat policies and microbatches")
    parser.add_argument("--flags", default="", metavar="PRESET", help="compiler flags to compile with, e.g. v5p")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--config.KEY", metavar="VALUE", dest="_", help="changes one knob, e.g. --config.mesh.data=2")
    overrides = [word.removeprefix("--config.") for word in argv if word.startswith("--config.")]
    args = parser.parse_args([word for word in argv if not word.startswith("--config.")])
    config = load_config(args.config, overrides)
    machines = hardware.machines_named(args.topology)
    if args.slices < 1:
        raise UserError(f"--slices {args.slices} is no number of slices; give 1 or more.")
    if not config.model.vocab_size and not args.vocab_size:
        raise UserError("config.model.vocab_size is 0, the tokenizer's, and no data is read; give --vocab-size.")
    vocab_size = config.model.vocab_size or args.vocab_size
    flags = hardware.flags_named(args.flags)
    if args.compile:
        if machines.accelerator.platform != "tpu":
            raise UserError(f"--compile is for TPUs: {args.topology} needs a machine with its GPUs to compile on.")
        aot.load_libtpu(flags)
    jax.config.update("jax_platforms", "cpu")  # plans are made on the CPU, also where a TPU is attached

    report = plan(config, machines, args.slices, vocab_size)
    if args.search:
        report["search"] = search(config, machines, args.slices, vocab_size)
        if args.compile:
            for choice in report["search"][:3]:
                changed = with_choice(config, choice)
                print(f"compiling {describe_choice(choice)}", file=sys.stderr)
                choice["compiled"] = compiled(changed, machines, args.slices, vocab_size)
    elif args.compile:
        print(f"compiling the train step for {machines.num_devices * args.slices} devices", file=sys.stderr)
        report["compiled"] = compiled(config, machines, args.slices, vocab_size)
    print(json.dumps(report) if args.json else "\n".join(describe(report)))
    if not report.get("compiled", {}).get("fits", True):
        raise UserError(does_not_fit(report))


def plan(config, machines: Slice, num_slices: int, vocab_size: int) -> dict:
    """Returns the arithmetic of a run as nested dicts of plain values; bytes and FLOPs are of one device and step.

    Raises:
        UserError: config and machines do not fit together.
    """
    mesh = aot.stand_in_mesh(config.mesh, machines, num_slices)
    if num_slices > 1 and mesh.shape["data"] % num_slices:
        raise UserError(
            f"config.mesh.data={mesh.shape['data']} is no multiple of the {num_slices} slices, which are joined along data; "
            f"set --config.mesh.data={num_slices}."
        )
    recipe = recipe_of_shapes(config, mesh, vocab_size)
    return arithmetic(config, recipe, dict(mesh.shape), machines, num_slices)


def recipe_of_shapes(config, mesh, vocab_size: int) -> Recipe:
    """Returns the recipe of a config for a mesh of absent devices, to read shapes from.

    It is put together with the reference attention, because cuDNN cannot even be traced where it is not installed;
    `attention` names what the run would use.
    """
    traced = config.copy_and_resolve_references()
    traced.model.attention = "xla"
    recipe = make_recipe(traced, aot.mask_token_stand_in(vocab_size), mesh)
    attention = choose(
        config.model.attention, platform=sharding.platform(mesh), packed=not config.data.attend_across_documents,
        sequence_length=config.data.sequence_length, head_dim=recipe.architecture.head_dim, dtype=recipe.dtype,
    )  # fmt: skip
    return recipe._replace(attention=attention)


def arithmetic(config, recipe: Recipe, shape: dict[str, int], machines: Slice, num_slices: int) -> dict:
    """Returns `plan` for a mesh of any shape; `recipe` may have been made for another one.

    Args:
        shape: {mesh axis: size}.
    """
    a, chip = recipe.architecture, machines.accelerator
    B, T, A = config.data.batch_size, config.data.sequence_length, config.optimizer.gradient_accumulation
    num_devices = machines.num_devices * num_slices
    is_causal = config.objective.name == "autoregressive"
    num_matmul = num_matmul_parameters(a)
    flops = measure.flops_per_token(num_matmul, a.num_layers, a.num_heads * a.head_dim, T, causal=is_causal)
    rows = B // A // (shape["data"] * shape["fsdp"] * shape["expert"])
    tokens = rows * T // shape["sequence"]  # of one device in one microbatch
    memory = memory_of(config, recipe, shape, rows=rows, tokens=tokens)
    traffic = traffic_of(config, recipe, shape, tokens=tokens, num_slices=num_slices)
    step = B * T * flops / num_devices * (1 + recomputed(config, recipe) / flops)
    seconds = step_seconds(step, traffic, machines, num_slices)
    num_tokens = recipe.num_steps * B * T
    return {
        "topology": machines.name, "slices": num_slices, "chips": machines.num_chips * num_slices,
        "hosts": machines.num_hosts * num_slices, "devices": num_devices,
        "accelerator": chip.name, "peak_flops": chip.peak_flops / chip.devices_per_chip,
        "usable_bytes": chip.usable_hbm_bytes // chip.devices_per_chip,
        "mesh": shape, "remat": config.model.remat, "attention": recipe.attention, "dtype": recipe.dtype.name,
        "parameters": num_parameters(a), "matmul_parameters": num_matmul, "vocab_size": a.vocab_size,
        "layers": a.num_layers, "d_attention": a.num_heads * a.head_dim, "sequence_length": T, "causal": is_causal,
        "flops_per_token": flops, "batch_size": B, "microbatches": A, "rows_per_device": rows,
        "tokens_per_device": tokens, "tokens_per_step": B * T, "num_steps": recipe.num_steps, "num_tokens": num_tokens,
        "executed_flops": step,
        "memory": memory,
        "traffic": traffic,
        "network_counted": is_network_known(machines),
        "intensity": intensity_of(machines, shape, num_slices, tokens=tokens, tokens_per_slice=B * T // A // num_slices),
        "seconds_per_step": seconds,
        "mfu": {k: B * T * flops / num_devices / (v * chip.peak_flops / chip.devices_per_chip) for k, v in seconds.items()},
        "days": {k: v * recipe.num_steps / 86400 for k, v in seconds.items()},
        "chip_hours": {
            k: v * recipe.num_steps / 3600 * machines.num_chips * num_slices for k, v in seconds.items()
        },
        "replicated": sharding.replicated_by_accident(recipe.abstract.params, recipe.batch_sharding.mesh),
    }  # fmt: skip


def memory_of(config, recipe: Recipe, shape: dict[str, int], *, rows: int, tokens: int) -> dict:
    """Returns bytes of one device: state (exact), and estimates of what a step adds.

    Counted in elements a token, with D, N, K, H, F as in llada_jax and heads and F divided by the tensor axis:
        saved by the forward pass for each layer: D (full: its input), + N H (attention: the output of attention),
            + D + (N + 2 K) H + 2 F + D (dots: the outputs of all products), + 2 D + (2 N + K) H + 2 F (none: norms,
            rotary, activations; scores too where attention is the reference);
        at work in the backward pass of one layer: 4 D + (3 N + 2 K) H + 4 F, and its weights twice, gathered;
        logits of one piece of the vocabulary and their gradient, float32, and the head's input and its gradient.
    """
    a, itemsize = recipe.architecture, recipe.dtype.itemsize
    D, L, t = a.d_model, a.num_layers, shape["tensor"]
    N, K, F = a.num_heads * a.head_dim / t, a.num_kv_heads * a.head_dim / t, a.d_ff / t
    scores = a.num_heads / t * config.data.sequence_length if recipe.attention == "xla" else 0
    saved = {
        "full": D,
        "attention": D + N,
        "dots": 3 * D + (N + 2 * K) + 2 * F,
        "none": 5 * D + (3 * N + 3 * K) + 4 * F + 3 * scores,
    }[config.model.remat]
    gradients = aot.sharded_bytes(recipe.abstract.params, shape)  # float32, as the parameters
    layer_weights = (num_matmul_parameters(a) - D * a.vocab_size) / L / t * itemsize
    num_pieces = -(-config.data.sequence_length // config.model.nll_chunk)
    layer = tokens * itemsize * (4 * D + 3 * N + 2 * K + 4 * F + 3 * scores) + 2 * layer_weights
    head = tokens * (2 * 4 * a.vocab_size / t / num_pieces + 2 * 4 * D)
    sizes = {
        "state": aot.sharded_bytes(recipe.abstract, shape),
        "gradients": gradients * (2 if config.optimizer.gradient_accumulation > 1 else 1),
        "saved_activations": int(tokens * L * saved * itemsize),
        "working": int(max(layer, head)),
    }
    return {**sizes, "peak": sum(sizes.values())}


def recomputed(config, recipe: Recipe) -> float:
    """Returns the FLOPs a token that the backward pass repeats: by remat policy, and the head when it is cut in pieces."""
    a, T = recipe.architecture, config.data.sequence_length
    head = a.d_model * a.vocab_size
    projections = 2 * (num_matmul_parameters(a) - head)
    scores = 4 * a.num_layers * a.num_heads * a.head_dim * T
    layers = {"none": 0, "dots": scores, "attention": projections, "full": projections + scores}[config.model.remat]
    return layers + (2 * head if config.data.sequence_length > config.model.nll_chunk else 0)


def traffic_of(config, recipe: Recipe, shape: dict[str, int], *, tokens: int, num_slices: int) -> dict:
    """Returns bytes of whole arrays that one device takes part in exchanging in one step, by purpose.

    gather: every weight matrix twice a microbatch (forward, backward), in the compute dtype, over fsdp. scatter: its
    gradient once a microbatch, over fsdp. data: the gradient's shard, over data within a slice; dcn: between slices.
    tensor: activations, twice forward, twice backward and once again when a layer is recomputed. sequence: keys and
    values, forward, backward and recomputed.
    """
    a, A, itemsize = recipe.architecture, config.optimizer.gradient_accumulation, recipe.dtype.itemsize
    matrices = num_matmul_parameters(a) / shape["tensor"] * itemsize
    again = config.model.remat in ("attention", "full")
    data, sequence = shape["data"] * shape["expert"], shape["sequence"]
    activations = tokens * a.num_layers * itemsize
    keys_and_values = 2 * a.num_kv_heads * a.head_dim / shape["tensor"]
    return {
        "gather": int(2 * A * matrices) if shape["fsdp"] > 1 else 0,
        "scatter": int(A * matrices) if shape["fsdp"] > 1 else 0,
        "data": int(A * matrices / shape["fsdp"]) if data > num_slices else 0,
        "dcn": int(A * matrices / shape["fsdp"]) if num_slices > 1 else 0,
        "tensor": int(A * activations * a.d_model * (5 if again else 4)) if shape["tensor"] > 1 else 0,
        "sequence": int(A * activations * sequence * keys_and_values * (3 if again else 2)) if sequence > 1 else 0,
    }


def bandwidth(machines: Slice) -> dict[str, float]:
    """Returns bytes a second that a device sends over ICI or NVLink: on all its links, and on one axis of the torus."""
    chip = machines.accelerator
    whole = chip.link_bandwidth / 2 / chip.devices_per_chip  # the table counts both directions
    return {"fast": whole, "slow": whole / len(machines.topology)}


def is_network_known(machines: Slice) -> bool:
    """Whether the table has the bandwidth of all that connects the devices: not between hosts of GPUs."""
    return machines.accelerator.platform == "tpu" or machines.num_hosts == 1


def step_seconds(executed_flops: float, traffic: dict, machines: Slice, num_slices: int) -> dict[str, float]:
    """Returns the time of a step, fast and slow.

    fast: EFFICIENCY["fast"] of the peak, all communication hidden behind it unless that takes longer, on all links, a
    gather or scatter of V bytes taking V / bandwidth, an all-reduce twice that.
    slow: EFFICIENCY["slow"], nothing hidden, on the links of one axis, and gathers and scatters done as all-reduces, as
    libtpu does over whole slices. Between the hosts of GPUs, communication is not counted: their network is not known.
    """
    chip = machines.accelerator
    links, seconds = bandwidth(machines), {}
    for case, efficiency in EFFICIENCY.items():
        once = traffic["gather"] + traffic["scatter"] + traffic["sequence"]
        twice = traffic["data"] + traffic["tensor"]
        exchanged = (once * (2 if case == "slow" else 1) + 2 * twice) / links[case]
        if num_slices > 1:
            exchanged += (
                2 * (num_slices - 1) / num_slices * traffic["dcn"] / (chip.dcn_bandwidth / chip.devices_per_chip)
            )
        if not is_network_known(machines):
            exchanged = 0.0
        computed = executed_flops / (efficiency * chip.peak_flops / chip.devices_per_chip)
        seconds[case] = max(computed, exchanged) if case == "fast" else computed + exchanged
    return seconds


def intensity_of(
    machines: Slice, shape: dict[str, int], num_slices: int, *, tokens: int, tokens_per_slice: int
) -> dict:
    """Returns tokens that there are and that must be, for computing to take longer than gathering weights.

    A layer of P parameters takes 6 P tokens FLOPs and moves 3 * 2 P bytes over fsdp (both bfloat16), so that it is bound
    by computing above peak / bandwidth tokens a device (the "How to Scale Your Model" book, chapter on training). With
    several slices, 2 * 2 P bytes of gradient go over the data centre network against 6 P tokens of FLOPs on a slice.
    """
    chip, links = machines.accelerator, bandwidth(machines)
    peak = chip.peak_flops / chip.devices_per_chip
    limits = {"tokens_per_device": tokens, "needed_on_all_links": peak / links["fast"] / shape["tensor"]}
    limits["needed_on_one_axis"] = peak / links["slow"] / shape["tensor"]
    if num_slices > 1:
        limits["tokens_per_slice"] = tokens_per_slice
        limits["needed_between_slices"] = chip.peak_flops / chip.dcn_bandwidth
    return limits


# ------------------------------------------------------------------------------------------------------------- compile


def compiled(config, machines: Slice, num_slices: int, vocab_size: int) -> dict:
    """Returns aot.compile_report of a config with `checks`: [(what, whether it is as meant, in words)]."""
    mesh = aot.absent_mesh(config.mesh, machines, num_slices)
    recipe = make_recipe(config, aot.mask_token_stand_in(vocab_size), mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    report = aot.compile_report(recipe, mesh, machines, shape=shape)
    if report["fits"]:
        meant = arithmetic(config, recipe, dict(mesh.shape), machines, num_slices)
        report["checks"] = checks(report, meant)
    return report


def checks(report: dict, meant: dict) -> list[dict]:
    """Compares the compiled program with what the mesh is meant to do."""
    totals = totals_by_purpose(report["collectives"])
    whole = sum(totals.values()) or 1
    found, traffic = [], meant["traffic"]

    def check(what: str, ok: bool, words: str) -> None:
        found.append({"what": what, "ok": bool(ok), "words": words})

    if traffic["gather"]:
        wide = sum(
            c["total_bytes"] for c in report["collectives"]
            if c["kind"].startswith("all-gather") and c["dtype"] == "f32" and c["total_bytes"] > 2**20
        )  # fmt: skip
        words = (
            f"{format_bytes(totals['gather'])} a step, {format_bytes(traffic['gather'])} meant (twice each microbatch)"
        )
        check("weights gathered", totals["gather"] < 1.3 * traffic["gather"], words)
        narrow = meant["dtype"] == "float32" or wide < 0.01 * whole
        check("gathered in", narrow, meant["dtype"] if narrow else f"float32: {format_bytes(wide)} a step")
    if traffic["scatter"]:
        reduced = totals["scatter"] + (
            totals["reduce"] if not traffic["data"] + traffic["dcn"] + traffic["tensor"] else 0
        )
        words = f"{format_bytes(reduced)} a step, {format_bytes(traffic['scatter'])} meant (once each microbatch)"
        check("gradients scattered", reduced < 1.3 * traffic["scatter"], words)
    elif traffic["data"]:
        words = f"{format_bytes(totals['reduce'])} a step, {format_bytes(traffic['data'])} meant"
        check("gradients reduced", totals["reduce"] < 1.3 * traffic["data"] + traffic["tensor"] * 1.5, words)
    if traffic["dcn"]:
        words = f"{format_bytes(totals['between'])} a device and step, {format_bytes(traffic['dcn'])} meant"
        check("between slices", totals["between"] < 2.5 * traffic["dcn"], words)
    check(
        "resharded", totals["reshard"] < 0.05 * whole,
        f"{format_bytes(totals['reshard'])} a step exchanged between layouts ({100 * totals['reshard'] / whole:.1f}%)",
    )  # fmt: skip
    check("replicated", not meant["replicated"], ", ".join(meant["replicated"]) or "no large parameter")
    splash = {name: times for name, times in report["kernels"].items() if "splash" in name}
    if meant["attention"] == "splash":
        words = (
            ", ".join(f"{name} x {times}" for name, times in sorted(splash.items())) or "splash is not in the program"
        )
        check("attention kernel", splash, words)
    else:
        check("attention kernel", False, f"{meant['attention']}: the scores of all positions are held in memory")
    return found


def totals_by_purpose(collectives: list[dict]) -> dict[str, int]:
    """Returns bytes a step that are gathered, scattered, reduced, exchanged between layouts, and sent between slices."""
    totals = dict.fromkeys(("gather", "scatter", "reduce", "reshard", "between"), 0)
    for c in collectives:
        kind = c["kind"].partition(" ")[0]
        purpose = {"all-gather": "gather", "reduce-scatter": "scatter", "all-reduce": "reduce"}.get(kind, "reshard")
        totals["between" if c["spans_slices"] else purpose] += c["total_bytes"]
    return totals


def does_not_fit(report: dict) -> str:
    """Returns the sentence for a program that is too large: the compiler's number and what to change, in this order."""
    c, accumulation = report["compiled"], report["microbatches"]
    remedies = [f"--config.model.remat={policy}" for policy in REMATS[REMATS.index(report["remat"]) + 1 :][-1:]]
    if report["rows_per_device"] > 1:
        remedies.append(f"--config.optimizer.gradient_accumulation={2 * accumulation}")
    if report["mesh"]["data"] > report["slices"]:
        remedies.append(f"--config.mesh.data={report['slices']} (more fsdp)")
    elif report["mesh"]["tensor"] < 8:
        remedies.append(f"--config.mesh.tensor={2 * report['mesh']['tensor']}")
    return (
        f"The train step needs {format_bytes(c['needed_bytes'])} and a {report['accelerator']} device has "
        f"{format_bytes(c['usable_bytes'])}: try {', then '.join(remedies)}, or a larger --topology."
    )


# -------------------------------------------------------------------------------------------------------------- search


def search(config, machines: Slice, num_slices: int, vocab_size: int) -> list[dict]:
    """Returns the choices of mesh, remat policy and microbatches that are estimated to fit, and that no other choice
    beats in both time and memory; the fastest first.

    Tried: data, fsdp and tensor (at most 8) as powers of two, microbatches up to one row a device; sequence and expert
    stay as they are.
    """
    base = aot.stand_in_mesh(config.mesh, machines, num_slices)
    recipe = recipe_of_shapes(config, base, vocab_size)
    fixed = base.shape["sequence"] * base.shape["expert"]
    rest = machines.num_devices * num_slices // fixed
    choices = []
    for tensor, data in itertools.product((1, 2, 4, 8), (num_slices * 2**i for i in range(20))):
        if rest % (tensor * data):
            continue
        shape = {**base.shape, "data": data, "fsdp": rest // (tensor * data), "tensor": tensor}
        for remat, accumulation in itertools.product(REMATS, (2**i for i in range(12))):
            if not is_divisible(config.data.batch_size, accumulation, recipe, shape):
                continue
            choice = {"mesh": shape, "remat": remat, "microbatches": accumulation}
            changed = with_choice(config, choice)
            found = arithmetic(changed, recipe, shape, machines, num_slices)
            if found["memory"]["peak"] < 0.95 * found["usable_bytes"]:
                choices.append(
                    {**choice, "peak": found["memory"]["peak"], "seconds_per_step": found["seconds_per_step"]}
                )
    if not choices:
        raise UserError(
            f"No mesh, remat policy or microbatch of {config.data.batch_size} rows is estimated to fit {machines.name}; take "
            "a larger --topology, or a shorter config.data.sequence_length."
        )
    middle = lambda choice: sum(choice["seconds_per_step"].values())  # noqa: E731
    choices.sort(key=lambda choice: (middle(choice), choice["peak"]))
    frontier, least = [], math.inf
    for choice in choices:
        if choice["peak"] < least:
            frontier.append(choice)
            least = choice["peak"]
    return frontier


def with_choice(config, choice: dict):
    """Returns a copy of the config with the mesh, remat policy and microbatches of a choice."""
    changed = config.copy_and_resolve_references()
    changed.mesh.update(choice["mesh"])
    changed.model.remat = choice["remat"]
    changed.optimizer.gradient_accumulation = choice["microbatches"]
    return changed


def is_divisible(batch_size: int, num_microbatches: int, recipe: Recipe, shape: dict[str, int]) -> bool:
    """Whether batch, width, heads and vocabulary can be split over a mesh, and every device has at least one row."""
    a, ways = recipe.architecture, shape["data"] * shape["fsdp"] * shape["expert"]
    split = [(batch_size, num_microbatches * ways), (a.d_model, shape["fsdp"])]
    split += [(size, shape["tensor"]) for size in (a.num_heads, a.num_kv_heads, a.d_ff, a.vocab_size)]
    return all(size % ways == 0 for size, ways in split)


# ------------------------------------------------------------------------------------------------------------ in words


def describe(p: dict) -> list[str]:
    """Returns the lines that are printed."""
    attention = f"{6 if p['causal'] else 12} * {p['layers']} layers * {p['d_attention']} * {p['sequence_length']}"
    memory, traffic, limits = p["memory"], p["traffic"], p["intensity"]
    where = f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"]
    lines = [
        f"model       {format_count(p['parameters'])} parameters, {format_count(p['matmul_parameters'])} in matrix "
        f"products, {p['vocab_size']:,} tokens",
        f"FLOPs       6 * {format_count(p['matmul_parameters'])} + {attention} = {format_count(p['flops_per_token'])} "
        "a token",
        f"machine     {where}: {p['chips']} chips, {p['hosts']} hosts, {p['devices']} devices of "
        f"{p['peak_flops'] / 1e12:.0f} TFLOP/s and {format_bytes(p['usable_bytes'])}",
        f"mesh        {describe_mesh(p['mesh'])}",
        f"step        {p['batch_size']} rows * {p['sequence_length']} = {p['tokens_per_step']:,} tokens in "
        f"{p['microbatches']} microbatch{'es' if p['microbatches'] > 1 else ''}: {p['rows_per_device']} "
        f"row{'s' if p['rows_per_device'] > 1 else ''}, "
        f"{p['tokens_per_device']:,} tokens a device in each",
        f"compute     {p['dtype']}, attention {p['attention']}, remat {p['remat']}",
        f"memory      {format_bytes(memory['state'])} parameters and optimizer state (exact)",
        f"            {format_bytes(memory['gradients'])} gradients, {format_bytes(memory['saved_activations'])} saved "
        f"activations, {format_bytes(memory['working'])} at work (estimates)",
        f"            {format_bytes(memory['peak'])} of {format_bytes(p['usable_bytes'])} a device at the peak"
        + (" (estimate)" if memory["peak"] < p["usable_bytes"] else ": estimated not to fit"),
        "traffic     "
        + (", ".join(f"{name} {format_bytes(n)}" for name, n in traffic.items() if n) or "none")
        + " a step",
        f"intensity   {limits['tokens_per_device']:,} tokens a device; computing hides the gathers above "
        f"{limits['needed_on_all_links']:,.0f} (all links) to {limits['needed_on_one_axis']:,.0f} (one axis)",
    ]
    if "tokens_per_slice" in limits:
        lines.append(
            f"            {limits['tokens_per_slice']:,} tokens a slice; computing hides the network between slices above "
            f"{limits['needed_between_slices']:,.0f}"
        )
    fast, slow = p["seconds_per_step"]["fast"], p["seconds_per_step"]["slow"]
    lines += [
        f"time        {format_seconds(fast)} to {format_seconds(slow)} a step: {100 * p['mfu']['slow']:.0f} to "
        f"{100 * p['mfu']['fast']:.0f}% MFU. Fast: {EFFICIENCY['fast']:.0%} of the peak with recomputation, "
        "communication hidden;",
        f"            slow: {EFFICIENCY['slow']:.0%}, nothing hidden, one axis of links, gathers done as all-reduces",
        f"run         {p['num_steps']:,} steps = {format_count(p['num_tokens'])} tokens: {p['days']['fast']:,.1f} to "
        f"{p['days']['slow']:,.1f} days, {format_count(p['chip_hours']['fast'])} to {format_count(p['chip_hours']['slow'])} "
        "chip-hours",
    ]
    if not p["network_counted"]:
        lines.append("            the network between GPU hosts is not known and not in the time")
    if "compiled" in p:
        lines += describe_compiled(p["compiled"])
    for choice in p.get("search", ())[:12]:
        lines.append("choice      " + describe_choice(choice))
    return lines


def describe_mesh(shape: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def describe_choice(choice: dict) -> str:
    number = choice["microbatches"]
    words = f"{describe_mesh(choice['mesh'])}, remat {choice['remat']}, {number} microbatch{'es' if number > 1 else ''}"
    if "peak" not in choice:
        return words
    fast, slow = choice["seconds_per_step"]["fast"], choice["seconds_per_step"]["slow"]
    words += f": {format_seconds(fast)} to {format_seconds(slow)} a step, about {format_bytes(choice['peak'])} a device"
    if "compiled" in choice:
        c = choice["compiled"]
        told = f"compiled: {format_bytes(c['peak_bytes'])}" if c["fits"] else "compiled: does not fit"
        words += f" ({told})"
    return words


def describe_compiled(c: dict) -> list[str]:
    if not c["fits"]:
        return [
            f"compiled    does not fit: {format_bytes(c['needed_bytes'])} needed, a device has "
            f"{format_bytes(c['usable_bytes'])}"
        ]
    lines = [
        f"compiled    in {format_seconds(c['seconds'])}: {format_bytes(c['peak_bytes'])} of "
        f"{format_bytes(c['usable_bytes'])} a device at the peak"
    ]
    kinds = {}
    for one in c["collectives"]:
        kind = one["kind"] + (" between slices" if one["spans_slices"] else "")
        times, total = kinds.get(kind, (0, 0))
        kinds[kind] = (times + one["times"], total + one["total_bytes"])
    for kind, (times, total) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        lines.append(f"            {format_bytes(total):>9} a step in {times:,} x {kind}")
    for check in c["checks"]:
        lines.append(f"  {'ok  ' if check['ok'] else 'LOOK'}      {check['what']}: {check['words']}")
    return lines
