"""`llada-jax plan`: what a config needs on machines that you have not rented yet.

It prints memory, time and cost. The arithmetic is exact where it can be (parameters, state, FLOPs)
and states its assumptions where it cannot (activations, time). `--compile` asks the compiler
instead: it builds the very train step that `llada-jax train` would run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from llada_jax.cluster import hardware
from llada_jax.cluster.compiler_flags import check_flags, flags_named
from llada_jax.cluster.hardware import ACCELERATORS, Slice, check_slices
from llada_jax.config import default_config, load_config
from llada_jax.errors import UserError
from llada_jax.planning.absent_devices import (
    absent_mesh,
    load_compiler,
    stand_in_mesh,
    stand_in_tokenizer,
)
from llada_jax.planning.check import check_program, compile_report
from llada_jax.planning.estimate import NETWORK_GBPS, crosses_hosts, estimate_run
from llada_jax.planning.search import REMATS, TENSOR_SIZES, find_choices
from llada_jax.ranges import RANGES, Range, check_number
from llada_jax.streams import write_line
from llada_jax.training.memory import Workload
from llada_jax.training.step import (
    Recipe,
    attention_for,
    make_recipe,
    resolved_remat,
    workload_of,
)
from llada_jax.units import format_bytes, format_count, format_seconds
from llada_jax.validation import AUTO, validate
from llada_jax.verbs.command_line import Parser, json_text


def make_parser() -> Parser:
    parser = Parser(
        "plan",
        "Reports memory, time and cost of a config on TPUs or GPUs that you have not rented yet.",
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
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="how many TPU slices, joined by the data centre network",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=0,
        metavar="V",
        help="needed if config.model.vocab_size is 0",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also ask the compiler; takes minutes"
    )
    parser.add_argument(
        "--search", action="store_true", help="try other meshes, remat policies and microbatches"
    )
    parser.add_argument(
        "--flags",
        default="",
        metavar="PRESET",
        help="preset of compiler flags for --compile, as in v5p",
    )
    parser.add_argument(
        "--network-gbps",
        type=float,
        metavar="N",
        help="Gbit/s of each GPU to other hosts (default: 400)",
    )
    parser.add_argument(
        "--price", type=float, default=0.0, metavar="X", help="of one chip-hour, for the cost"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str]) -> None:
    args, overrides = make_parser().parse_with_overrides(argv)
    config = load_config(args.config, overrides)
    machines = hardware.machines_named(args.topology)
    check_number("--slices ", args.slices, Range(1))
    check_slices(machines, args.slices)
    check_network(args.network_gbps, machines)
    check_number("--price ", args.price, Range(0, 1e6))
    check_number("--vocab-size ", args.vocab_size, RANGES["model.vocab_size"])
    if not config.model.vocab_size and not args.vocab_size:
        raise UserError(
            "config.model.vocab_size is 0, which takes the tokenizer's, and a plan reads no data; "
            "give --vocab-size."
        )
    vocab_size = config.model.vocab_size or args.vocab_size
    if args.vocab_size not in (0, vocab_size):
        raise UserError(
            f"--vocab-size {args.vocab_size} changes nothing, because config.model.vocab_size is "
            f"{vocab_size}; leave out --vocab-size, or set "
            f"--config.model.vocab_size={args.vocab_size}."
        )
    check_vocabulary(config, vocab_size)
    flags = flags_named(args.flags)
    check_flags(flags, machines.accelerator.platform)
    if flags and not args.compile:
        raise UserError(
            f"--flags {args.flags} changes nothing without --compile; add it, or leave out --flags."
        )
    if args.compile:
        load_compiler(machines, flags)
    # Everything here runs on the CPU, even where a TPU is attached: a plan must not take its chips.
    jax.config.update("jax_platforms", "cpu")

    asked = Asked(config, machines, args.slices, vocab_size, args.network_gbps or NETWORK_GBPS)
    report = estimate(asked)
    if args.price:
        report["price"] = args.price
        report["cost"] = {case: args.price * h for case, h in report["chip_hours"].items()}
    if args.search:
        report["search"] = search(asked)
    if report["memory"]["peak"] > report["usable_bytes"]:
        report["fit"] = knobs_that_fit(asked)
    # The memory of a choice is an estimate, so the compiler is asked about the fastest; about three
    # alone, because each compilation takes minutes.
    if args.search and args.compile:
        for choice in report["search"][:3]:
            write_line(f"compiling {describe_choice(choice)}")
            changed = asked._replace(config=with_choice(config, choice))
            choice["compiled"] = compile_and_check(changed)
    elif args.compile:
        num_devices = machines.num_devices * args.slices
        write_line(f"compiling the train step for {num_devices} devices")
        report["compiled"] = compile_and_check(asked)
    print(json_text(report) if args.json else "\n".join(describe(report)))
    # After the report and not instead of it: the report says what takes the memory.
    if not report.get("compiled", {}).get("fits", True):
        raise UserError(does_not_fit(report, asked))


# ---- from the config to the arguments of llada_jax.planning


class Asked(NamedTuple):
    """What a plan is asked about: a config on some machines, see `main`."""

    config: Any
    machines: Slice
    num_slices: int
    vocab_size: int
    network_gbps: float = NETWORK_GBPS


def check_network(network_gbps: float | None, machines: Slice) -> None:
    """Raises UserError for a --network-gbps that is out of range or that no time depends on."""
    if network_gbps is None:
        return
    check_number("--network-gbps ", network_gbps, Range(1e-3, 1e6))
    if not crosses_hosts(machines):
        where = "has TPUs" if machines.accelerator.platform == "tpu" else "is one host"
        raise UserError(
            f"--network-gbps {network_gbps:g} changes nothing, because it is the rate of GPUs to "
            f"other hosts, and {machines.name} {where}; leave out --network-gbps."
        )


def check_vocabulary(config, vocab_size: int) -> None:
    """Raises UserError for a model that no machine holds once the vocabulary is known."""
    known = config.copy_and_resolve_references()
    known.model.vocab_size = vocab_size
    validate(known, default_config())


def recipe_of_shapes(config, mesh, vocab_size: int) -> Recipe:
    """Returns the recipe of a config for a stand-in mesh, from which only shapes can be read.

    It is assembled with the reference attention, because cuDNN cannot even be traced where it is
    not installed; `attention` names the kernel that the run would use.
    """
    traced = config.copy_and_resolve_references()
    traced.model.attention = "xla"
    # chosen below, for the kernel of the run
    if traced.model.remat == AUTO:
        traced.model.remat = "full"
    recipe = make_recipe(traced, stand_in_tokenizer(vocab_size), mesh)
    attention = attention_for(
        config, recipe.architecture, recipe.objective.mask, mesh, dtype=recipe.dtype
    )
    recipe = recipe._replace(attention=attention)
    return recipe._replace(remat=resolved_remat(config, recipe, mesh))


def _of_shapes(asked: Asked) -> tuple[Recipe, Workload, dict[str, int], Slice, int]:
    """Returns the arguments of `estimate_run` and of `find_choices`, for stand-ins."""
    config = asked.config
    mesh = stand_in_mesh(config.mesh, asked.machines, asked.num_slices)
    recipe = recipe_of_shapes(config, mesh, asked.vocab_size)
    workload = workload_of(config)._replace(remat=recipe.remat)
    return recipe, workload, dict(mesh.shape), asked.machines, asked.num_slices


def estimate(asked: Asked) -> dict:
    """Returns the estimate of a config; raises UserError if the machines cannot split it."""
    return estimate_run(*_of_shapes(asked), network_gbps=asked.network_gbps)


def search(asked: Asked) -> list[dict]:
    """Returns llada_jax.planning.search.find_choices of a config."""
    return find_choices(*_of_shapes(asked), network_gbps=asked.network_gbps)


def knobs_that_fit(asked: Asked) -> list[str]:
    """Returns the flags of the fastest choice that is estimated to fit; [] where there is none."""
    try:
        choice = search(asked)[0]
    except UserError:
        return []
    config, mesh = asked.config, dict(choice["mesh"])
    # Compared with sizes and not with knobs: fsdp=-1 of the config may be the 128 of the choice.
    shape = stand_in_mesh(config.mesh, asked.machines, asked.num_slices).shape
    flags = [f"mesh.{axis}={size}" for axis, size in mesh.items() if size != shape[axis]]
    if choice["remat"] != config.model.remat:
        flags.append(f"model.remat={choice['remat']}")
    if choice["microbatches"] != config.optimizer.gradient_accumulation:
        flags.append(f"optimizer.gradient_accumulation={choice['microbatches']}")
    return [f"--config.{flag}" for flag in flags]


def with_choice(config, choice: dict):
    """Returns a copy of the config with the mesh, remat policy and microbatches of a choice."""
    changed = config.copy_and_resolve_references()
    changed.mesh.update(choice["mesh"])
    changed.model.remat = choice["remat"]
    changed.optimizer.gradient_accumulation = choice["microbatches"]
    return changed


def compile_and_check(asked: Asked) -> dict:
    """Returns llada_jax.planning.check.compile_report of a config, with "checks" where it fits."""
    config, machines, num_slices = asked.config, asked.machines, asked.num_slices
    mesh = absent_mesh(config.mesh, machines, num_slices)
    recipe = make_recipe(config, stand_in_tokenizer(asked.vocab_size), mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    report = compile_report(recipe, mesh, machines, shape=shape)
    if report["fits"]:
        # Of this recipe and not of one for stand-ins: its attention is the one that was compiled.
        workload = workload_of(config)._replace(remat=recipe.remat)
        meant = estimate_run(recipe, workload, dict(mesh.shape), machines, num_slices)
        report["checks"] = check_program(report, meant)
    return report


def does_not_fit(report: dict, asked: Asked) -> str:
    """Returns the sentence for a program that is too large: its size, and what to change.

    The remedies come in the order of their price (docs/plan.md, "It does not fit"). Those that the
    run could not be split by are left out.
    """
    compiled, mesh, rows = report["compiled"], report["mesh"], report["rows_per_device"]
    remedies = []
    if report["remat"] != REMATS[-1]:
        remedies.append(("model.remat", REMATS[-1], ""))
    if rows > 1:
        # as few microbatches as divide the rows that a device has
        more = next(n for n in range(2, rows + 1) if rows % n == 0)
        remedies.append(("optimizer.gradient_accumulation", more * report["microbatches"], ""))
    if mesh["data"] > report["slices"]:
        remedies.append(("mesh.data", report["slices"], " (more fsdp)"))
    elif mesh["tensor"] < TENSOR_SIZES[-1]:
        remedies.append(("mesh.tensor", 2 * mesh["tensor"], ""))
    possible = [
        f"--config.{name}={value}{note}"
        for name, value, note in remedies
        if is_possible(asked, {name: value})
    ]
    return (
        f"The train step needs {format_bytes(compiled['needed_bytes'])} and a "
        f"{report['accelerator']} device has {format_bytes(compiled['usable_bytes'])}: "
        f"try {', then '.join([*possible, 'a larger --topology'])}."
    )


def is_possible(asked: Asked, knobs: dict) -> bool:
    """Whether a plan takes the config with some knobs changed, {dotted name: value}."""
    config = asked.config.copy_and_resolve_references()
    config.update_from_flattened_dict(knobs)
    try:
        check_vocabulary(config, asked.vocab_size)
        estimate(asked._replace(config=config))
    except UserError:
        return False
    return True


# ---- in words


def describe(p: dict) -> list[str]:
    """Returns the lines that are printed for a report."""
    lines = [*_describe_run(p), *_describe_needs(p), *_describe_time(p)]
    if "compiled" in p:
        lines += describe_compiled(p["compiled"])
    lines += [f"choice      {describe_choice(choice)}" for choice in p.get("search", ())[:12]]
    return lines


def _describe_run(p: dict) -> list[str]:
    """Returns the lines about what is run where, all of them exact."""
    matrices = format_count(p["matmul_parameters"])
    attention = (
        f"{6 if p['causal'] else 12} * {p['layers']} layers * {p['d_attention']} "
        f"* {p['sequence_length']}"
    )
    arithmetic = f"6 * {matrices} + {attention}"
    if p["passes"] != 1:
        arithmetic = f"{p['passes']:.2f} passes * ({arithmetic})"
    scored = (
        f"; logits of {p['scored_share']:.0%} of the positions" if p["scored_share"] < 1 else ""
    )
    where = f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"]
    return [
        f"model       {format_count(p['parameters'])} parameters, {matrices} in matrix products, "
        f"{p['vocab_size']:,} tokens",
        f"FLOPs       {arithmetic} = {format_count(p['flops_per_token'])} per token",
        f"machine     {where}: {p['chips']} chips, {p['hosts']} hosts, {p['devices']} devices of "
        f"{p['peak_flops'] / 1e12:.0f} TFLOP/s and {format_bytes(p['usable_bytes'])}",
        f"mesh        {describe_mesh(p['mesh'])}",
        f"step        {p['batch_size']} rows * {p['sequence_length']} = {p['tokens_per_step']:,} "
        f"tokens in {_counted(p['microbatches'], 'microbatch', 'es')}: "
        f"{_counted(p['rows_per_device'], 'row')}, {p['tokens_per_device']:,} tokens per device in "
        "each",
        f"compute     {p['dtype']}, attention {p['attention']}, remat {p['remat']}; gradients of "
        f"matrices summed in {p['gradient_dtype']}{scored}",
    ]


def _describe_needs(p: dict) -> list[str]:
    """Returns the lines about memory and traffic."""
    memory, traffic, limits = p["memory"], p["traffic"], p["intensity"]
    sizes = {name: format_bytes(size) for name, size in memory.items()}
    fits = memory["peak"] < p["usable_bytes"]
    exchanged = ", ".join(f"{name} {format_bytes(size)}" for name, size in traffic.items() if size)
    frozen = f", {sizes['frozen']} of it frozen" if memory["frozen"] else ""
    lines = [
        f"memory      {sizes['state']} parameters and optimizer state (exact){frozen}",
        f"            {sizes['gradients']} gradients, {sizes['saved_activations']} saved "
        f"activations, {sizes['working']} at work (estimates)",
        f"            {sizes['peak']} of {format_bytes(p['usable_bytes'])} per device at the peak"
        + (" (estimate)" if fits else ": estimated not to fit"),
        *_describe_fit(p),
        f"traffic     {exchanged or 'none'} per step",
        f"intensity   {limits['tokens_per_device']:,} tokens per device; computing hides the "
        f"gathers above {limits['needed_on_all_links']:,.0f} (all links) to "
        f"{limits['needed_on_one_axis']:,.0f} (one axis)",
    ]
    if "tokens_per_slice" in limits:
        lines.append(
            f"            {limits['tokens_per_slice']:,} tokens per slice; computing hides the "
            f"network between slices above {limits['needed_between_slices']:,.0f}"
        )
    return lines


def _describe_fit(p: dict) -> list[str]:
    """Returns what to change where the estimate does not fit."""
    if "fit" not in p:
        return []
    if not p["fit"]:
        return ["            no other mesh, remat policy or microbatches fit these machines"]
    return [f"            the fastest that fits: {' '.join(p['fit'])}"]


def _describe_time(p: dict) -> list[str]:
    """Returns the lines about time and cost, each a range with its assumptions."""
    seconds, mfu, days, chip_hours = p["seconds_per_step"], p["mfu"], p["days"], p["chip_hours"]
    efficiency = p["efficiency"]
    if p["network_gbps"]:
        links = f"70% of the links and of {p['network_gbps']:g} Gbit/s per GPU between hosts"
    elif ACCELERATORS[p["accelerator"]].platform == "gpu":
        links = "70% of the links"
    else:
        links = "one axis of links, gathers done as all-reduces"
    lines = [
        f"time        {format_seconds(seconds['fast'])} to {format_seconds(seconds['slow'])} per "
        f"step: {100 * mfu['slow']:.0f} to {100 * mfu['fast']:.0f}% MFU. "
        f"Fast: {efficiency['fast']:.0%} of the peak with recomputation, communication hidden;",
        f"            slow: {efficiency['slow']:.0%}, nothing hidden, {links}",
        f"run         {p['num_steps']:,} steps = {format_count(p['num_tokens'])} tokens: "
        f"{_range(days, '{:,.1f}'.format)} days, {_range(chip_hours, format_count)} chip-hours",
    ]
    if "cost" in p:
        lines.append(
            f"cost        {_range(p['cost'], '{:,.0f}'.format)} at {p['price']:g} per chip-hour"
        )
    return lines


def _range(cases: dict[str, float], form: Callable[[float], str]) -> str:
    """Returns "12 to 34" for a fast and a slow case; small numbers have two digits."""
    fast, slow = (
        form(number) if number >= 9.95 else f"{number:.2g}"
        for number in (cases["fast"], cases["slow"])
    )
    return f"{fast} to {slow}"


def describe_mesh(shape: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"


def describe_choice(choice: dict) -> str:
    fast, slow = choice["seconds_per_step"]["fast"], choice["seconds_per_step"]["slow"]
    words = (
        f"{describe_mesh(choice['mesh'])}, remat {choice['remat']}, "
        f"{_counted(choice['microbatches'], 'microbatch', 'es')}: {format_seconds(fast)} to "
        f"{format_seconds(slow)} per step, about {format_bytes(choice['peak'])} per device"
    )
    if "compiled" not in choice:
        return words
    compiled = choice["compiled"]
    result = format_bytes(compiled["peak_bytes"]) if compiled["fits"] else "does not fit"
    return f"{words} (compiled: {result})"


def describe_compiled(compiled: dict) -> list[str]:
    usable = format_bytes(compiled["usable_bytes"])
    if not compiled["fits"]:
        needed = format_bytes(compiled["needed_bytes"])
        return [f"compiled    does not fit: {needed} needed, a device has {usable}"]
    lines = [
        f"compiled    in {format_seconds(compiled['seconds'])}: "
        f"{format_bytes(compiled['peak_bytes'])} of {usable} per device at the peak"
    ]
    lines += _describe_collectives(compiled["collectives"])
    copies = compiled["layout_copies"]
    kernels = ", ".join(f"{name} x {n}" for name, n in sorted(compiled["kernels"].items()))
    lines += [
        f"            {format_bytes(copies['total_bytes']):>9} per step in {copies['times']:,} x "
        "copy to another layout",
        f"            kernels: {kernels or 'none'}",
    ]
    for check in compiled["checks"]:
        mark = "ok  " if check["ok"] else "LOOK"
        lines.append(f"  {mark}      {check['what']}: {check['words']}")
    return lines


def _describe_collectives(collectives: list[dict]) -> list[str]:
    """Returns a line for each kind of collective and the axes that it goes over."""
    sums = {}
    for one in collectives:
        where = " between slices" if one["spans_slices"] else f" over {one['axes']}"
        so_far = sums.setdefault(one["kind"] + where, {"times": 0, "bytes": 0, "hidden": 0})
        so_far["times"] += one["times"]
        so_far["bytes"] += one["total_bytes"]
        so_far["hidden"] += one["times"] * one["is_overlapped"]
    return [
        f"            {format_bytes(total['bytes']):>9} per step in {total['times']:,} x {kind}, "
        f"{total['hidden']:,} of them around a product"
        for kind, total in sorted(sums.items(), key=lambda item: -item[1]["bytes"])
    ]


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number > 1 else ''}"
