"""Reads from the text of a compiled program which kernels it calls and what it copies."""

import collections
import re
from typing import NamedTuple

from llada_jax.planning.hlo import (
    CONVERSIONS,
    Computations,
    Instruction,
    array_bytes,
    attribute,
    executions,
    parse,
    root_opcode,
)

# A copy of less than this costs next to nothing: it is one of counters, norms and small tables.
_SMALL_BYTES = 2**20
# Operations that write the elements of an array in another order.
_REORDERING = ("copy", "transpose", "reshape")
# Operations that only move elements.
_COPYING = ("copy", "slice", "dynamic-slice")


def kernels(text: str) -> dict[str, int]:
    """Returns {name of a custom kernel (Pallas, cuDNN): its number of calls per step}."""
    computations = parse(text)
    counted = collections.Counter()
    for name, times in executions(computations).items():
        for instruction in computations[name]:
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            if instruction.opcode != "custom-call" or not target:
                continue
            if target.group(1) == "tpu_custom_call":
                # Pallas on TPUs: all kernels have one target, and XLA names the instruction after
                # the kernel, with a number where there are several.
                counted[re.sub(r"[.\d]+$", "", instruction.name)] += times
            elif re.search("triton|cudnn|fmha", target.group(1)):
                counted[target.group(1)] += times
    return dict(counted)


class Copies(NamedTuple):
    """How often a step copies a large array into another layout, and the bytes that it writes."""

    times: int
    total_bytes: int


def layout_copies(text: str) -> Copies:
    """Returns the copies of a compiled program that only change the layout of a large array.

    They compute nothing: each reads and writes an array because two operations want its elements in
    two orders. Counted are those that are instructions of their own, and fusions that end in one.
    A copy from one memory space to another, as TPUs make ahead of a product, keeps the layout and
    is not counted.
    """
    computations = parse(text)
    copies, total = 0, 0
    for name, times in executions(computations).items():
        body = {instruction.name: instruction for instruction in computations[name]}
        for instruction in body.values():
            num_bytes = array_bytes(instruction.type)
            if num_bytes >= _SMALL_BYTES and _reorders(instruction, body, computations):
                copies += times
                total += times * num_bytes
    return Copies(copies, total)


def copies_in_loops(text: str) -> Copies:
    """Returns the large copies that one iteration of each loop makes: of whole arrays, and of a
    part of a stacked array that an operation needs by itself.

    They compute nothing, and as what a loop moves is often all that it costs, they may be most of
    its time. An iteration is counted as often as `executions` says of those around it.
    """
    computations = parse(text)
    bodies = {
        attribute(instruction, "body")
        for body in computations.values()
        for instruction in body
        if instruction.opcode == "while"
    }
    copies, total = 0, 0
    for name, times in executions(computations).items():
        for instruction in computations[name] if name in bodies else ():
            num_bytes = array_bytes(instruction.type)
            is_copy = root_opcode(instruction, computations) in _COPYING
            if num_bytes >= _SMALL_BYTES and is_copy:
                copies += times
                total += times * num_bytes
    return Copies(copies, total)


def _reorders(
    instruction: Instruction, body: dict[str, Instruction], computations: Computations
) -> bool:
    """Whether an instruction, or the fusion it calls, ends by writing an array in another order."""
    if instruction.opcode == "fusion":
        inside = {i.name: i for i in computations[attribute(instruction, "calls")]}
        last = next(i for i in inside.values() if i.is_root)
        while last.opcode in CONVERSIONS and not _reorders(last, inside, computations):
            if last.operands[0] not in inside:
                return False
            last = inside[last.operands[0]]
        return last.opcode != "fusion" and _reorders(last, inside, computations)
    if instruction.opcode not in _REORDERING:
        return False
    source = body.get(instruction.operands[0])
    if instruction.opcode != "copy" or source is None:
        return instruction.opcode != "copy"
    return _order(source.type) != _order(instruction.type)


def _order(type_text: str) -> str:
    """Returns the layout of the first array of a type, without the memory space it is in."""
    found = re.search(r"\{([^}]*)\}", type_text)
    return re.sub(r"S\(\d+\)", "", found.group(1)).rstrip(":") if found else ""
