"""`llada-jax plan`: what a config needs on a machine that is not there: memory, time, cost, and the
compiled program.

The arithmetic is exact where it can be (parameters, state, FLOPs) and stated with its assumptions
where it cannot (activations, time). `--compile` asks the compiler instead: it builds the very train
step that `llada-jax train` would run.
"""

import json
import sys

import jax

from llada_jax.cluster import hardware
from llada_jax.cluster.compiler_flags import flags_named
from llada_jax.cluster.hardware import Slice
from llada_jax.config import load_config
from llada_jax.errors import UserError
from llada_jax.planning import absent_devices
from llada_jax.planning.check import compiled
from llada_jax.planning.estimate import EFFICIENCY, arithmetic, recipe_of_shapes
from llada_jax.planning.search import REMATS, search_choices, with_choice
from llada_jax.units import format_bytes, format_count, format_seconds
from llada_jax.verbs.command_line import Parser


def main(argv: list[str]) -> None:
    parser = Parser(
        "plan",
        "Tells memory, time and cost of a config on TPU slices or GPUs that need not be there.",
        "llada-jax plan --config configs/llada_8b.py --topology v5p-128 --compile",
    )
    parser.add_config_flags(
        file="Python file with get_config()",
        knob="changes one knob, e.g. --config.mesh.data=2",
    )
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="TPU slice (v5p-128) or GPUs (64xh100)"
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="of that topology, joined by the network"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=0, metavar="V", help="if config.model.vocab_size is 0"
    )
    parser.add_argument(
        "--compile", action="store_true", help="ask libtpu's compiler too; takes minutes"
    )
    parser.add_argument(
        "--search", action="store_true", help="try other meshes, remat policies and microbatches"
    )
    parser.add_argument(
        "--flags", default="", metavar="PRESET", help="compiler flags to compile with, e.g. v5p"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args, overrides = parser.parse_with_overrides(argv)
    config = load_config(args.config, overrides)
    machines = hardware.machines_named(args.topology)
    if args.slices < 1:
        raise UserError(f"--slices {args.slices} is no number of slices; give 1 or more.")
    if not config.model.vocab_size and not args.vocab_size:
        raise UserError(
            "config.model.vocab_size is 0, the tokenizer's, and no data is read; give --vocab-size."
        )
    vocab_size = config.model.vocab_size or args.vocab_size
    flags = flags_named(args.flags)
    if args.compile:
        if machines.accelerator.platform != "tpu":
            raise UserError(
                f"--compile is for TPUs: {args.topology} needs a machine with its GPUs to compile "
                "on."
            )
        absent_devices.load_libtpu(flags)
    jax.config.update(
        "jax_platforms", "cpu"
    )  # plans are made on the CPU, also where a TPU is attached

    report = plan(config, machines, args.slices, vocab_size)
    if args.search:
        report["search"] = search_choices(config, machines, args.slices, vocab_size)
        if args.compile:
            for choice in report["search"][:3]:
                changed = with_choice(config, choice)
                print(f"compiling {describe_choice(choice)}", file=sys.stderr)
                choice["compiled"] = compiled(changed, machines, args.slices, vocab_size)
    elif args.compile:
        print(
            f"compiling the train step for {machines.num_devices * args.slices} devices",
            file=sys.stderr,
        )
        report["compiled"] = compiled(config, machines, args.slices, vocab_size)
    print(json.dumps(report) if args.json else "\n".join(describe(report)))
    if not report.get("compiled", {}).get("fits", True):
        raise UserError(does_not_fit(report))


def plan(config, machines: Slice, num_slices: int, vocab_size: int) -> dict:
    """Returns the arithmetic of a run as nested dicts of plain values; bytes and FLOPs are of one
    device and step.

    Raises:
        UserError: config and machines do not fit together.
    """
    mesh = absent_devices.stand_in_mesh(config.mesh, machines, num_slices)
    if num_slices > 1 and mesh.shape["data"] % num_slices:
        raise UserError(
            f"config.mesh.data={mesh.shape['data']} is no multiple of the {num_slices} slices, "
            "which are joined along data; "
            f"set --config.mesh.data={num_slices}."
        )
    recipe = recipe_of_shapes(config, mesh, vocab_size)
    return arithmetic(config, recipe, dict(mesh.shape), machines, num_slices)


# ---- compile


def does_not_fit(report: dict) -> str:
    """Returns the sentence for a program that is too large: the compiler's number and what to
    change, in this order.
    """
    c, accumulation = report["compiled"], report["microbatches"]
    remedies = [
        f"--config.model.remat={policy}"
        for policy in REMATS[REMATS.index(report["remat"]) + 1 :][-1:]
    ]
    if report["rows_per_device"] > 1:
        remedies.append(f"--config.optimizer.gradient_accumulation={2 * accumulation}")
    if report["mesh"]["data"] > report["slices"]:
        remedies.append(f"--config.mesh.data={report['slices']} (more fsdp)")
    elif report["mesh"]["tensor"] < 8:
        remedies.append(f"--config.mesh.tensor={2 * report['mesh']['tensor']}")
    return (
        f"The train step needs {format_bytes(c['needed_bytes'])} and a {report['accelerator']} "
        "device has "
        f"{format_bytes(c['usable_bytes'])}: try {', then '.join(remedies)}, or a larger "
        "--topology."
    )


# ---- in words


def describe(p: dict) -> list[str]:
    """Returns the lines that are printed."""
    attention = f"{6 if p['causal'] else 12} * {p['layers']} layers * {p['d_attention']} * {p['sequence_length']}"
    memory, traffic, limits = p["memory"], p["traffic"], p["intensity"]
    where = f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"]
    lines = [
        f"model       {format_count(p['parameters'])} parameters, "
        f"{format_count(p['matmul_parameters'])} in matrix "
        f"products, {p['vocab_size']:,} tokens",
        f"FLOPs       6 * {format_count(p['matmul_parameters'])} + {attention} = "
        f"{format_count(p['flops_per_token'])} "
        "a token",
        f"machine     {where}: {p['chips']} chips, {p['hosts']} hosts, {p['devices']} devices of "
        f"{p['peak_flops'] / 1e12:.0f} TFLOP/s and {format_bytes(p['usable_bytes'])}",
        f"mesh        {describe_mesh(p['mesh'])}",
        f"step        {p['batch_size']} rows * {p['sequence_length']} = {p['tokens_per_step']:,} "
        "tokens in "
        f"{p['microbatches']} microbatch{'es' if p['microbatches'] > 1 else ''}: "
        f"{p['rows_per_device']} "
        f"row{'s' if p['rows_per_device'] > 1 else ''}, "
        f"{p['tokens_per_device']:,} tokens a device in each",
        f"compute     {p['dtype']}, attention {p['attention']}, remat {p['remat']}",
        f"memory      {format_bytes(memory['state'])} parameters and optimizer state (exact)",
        f"            {format_bytes(memory['gradients'])} gradients, "
        f"{format_bytes(memory['saved_activations'])} saved "
        f"activations, {format_bytes(memory['working'])} at work (estimates)",
        f"            {format_bytes(memory['peak'])} of {format_bytes(p['usable_bytes'])} a device "
        "at the peak"
        + (" (estimate)" if memory["peak"] < p["usable_bytes"] else ": estimated not to fit"),
        "traffic     "
        + (", ".join(f"{name} {format_bytes(n)}" for name, n in traffic.items() if n) or "none")
        + " a step",
        f"intensity   {limits['tokens_per_device']:,} tokens a device; computing hides the gathers "
        "above "
        f"{limits['needed_on_all_links']:,.0f} (all links) to {limits['needed_on_one_axis']:,.0f} "
        "(one axis)",
    ]
    if "tokens_per_slice" in limits:
        lines.append(
            f"            {limits['tokens_per_slice']:,} tokens a slice; computing hides the "
            "network between slices above "
            f"{limits['needed_between_slices']:,.0f}"
        )
    fast, slow = p["seconds_per_step"]["fast"], p["seconds_per_step"]["slow"]
    lines += [
        f"time        {format_seconds(fast)} to {format_seconds(slow)} a step: "
        f"{100 * p['mfu']['slow']:.0f} to "
        f"{100 * p['mfu']['fast']:.0f}% MFU. Fast: {EFFICIENCY['fast']:.0%} of the peak with "
        "recomputation, "
        "communication hidden;",
        f"            slow: {EFFICIENCY['slow']:.0%}, nothing hidden, one axis of links, gathers "
        "done as all-reduces",
        f"run         {p['num_steps']:,} steps = {format_count(p['num_tokens'])} tokens: "
        f"{p['days']['fast']:,.1f} to "
        f"{p['days']['slow']:,.1f} days, {format_count(p['chip_hours']['fast'])} to "
        f"{format_count(p['chip_hours']['slow'])} "
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
        told = (
            f"compiled: {format_bytes(c['peak_bytes'])}" if c["fits"] else "compiled: does not fit"
        )
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
        lines.append(
            f"  {'ok  ' if check['ok'] else 'LOOK'}      {check['what']}: {check['words']}"
        )
    return lines
