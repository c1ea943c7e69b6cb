"""The text of a compiled program (HLO) as instructions, and how often each of them is executed.

JAX has no public API for the instructions of a compiled program; its text is public, and it is what
people look at too.
"""

import collections
import math
import re
from typing import NamedTuple

from llada_jax.models.token_scores import SELDOM

# Operations that change the layout or the element type of an array and not what it holds.
CONVERSIONS = ("bitcast", "copy", "convert")

# Instructions that start another computation and go on; "call-start" hands it to a SparseCore.
ASYNCHRONOUS_CALLS = ("async-start", "call-start")

_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|c64|c128|[su]\d+|f8\w*|f4\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")


class Instruction(NamedTuple):
    """One line of a computation: `name = type opcode(operands), rest`.

    type (of the result) and rest (the attributes) are kept as written. is_root: whether its result
    is that of the computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


# What the condition of a loop that counts consists of.
_OF_COUNTERS = (
    *CONVERSIONS,
    *("parameter", "get-tuple-element", "constant", "compare", "fusion"),
)

# {name of a computation: its instructions}
Computations = dict[str, list[Instruction]]


# ---- from text to instructions


def parse(text: str) -> Computations:
    """Returns {computation: its instructions}; the entry is also found under "ENTRY"."""
    computations, body = {}, []
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            body = computations.setdefault(opened.group(1), [])
            if line.startswith("ENTRY"):
                computations["ENTRY"] = body
            continue
        found = _INSTRUCTION.match(line)
        # The type may be a tuple with spaces, so the opcode is the first word before a parenthesis.
        opcode = _OPCODE.search(found.group(3)) if found else None
        if not found or not opcode:
            continue
        right = found.group(3)
        inside, _, rest = right[opcode.end() :].partition(")")
        # Operands have a % in front of them, except in programs printed without it. Constants and
        # parameters have a number there, which is kept as their only operand.
        operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
        body.append(
            Instruction(
                name=found.group(2),
                type=right[: opcode.start()],
                opcode=opcode.group(1),
                operands=tuple(operands),
                rest=rest,
                is_root=bool(found.group(1)),
            )
        )
    return computations


def attribute(instruction: Instruction, name: str) -> str:
    """Returns the computation that an attribute names, "" without the attribute."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def called_computation(call: Instruction) -> str:
    """Returns the computation that a call, or an asynchronous one, executes."""
    return attribute(call, "to_apply") or attribute(call, "calls")


def arrays(type_text: str) -> list[tuple[int, str]]:
    """Returns (bytes, dtype) of each array in a result type."""
    found = []
    for dtype, dims in _ARRAY.findall(type_text):
        item = _ITEM_BYTES.get(dtype) or max(1, int(re.search(r"\d+", dtype).group()) // 8)  # type: ignore[union-attr]
        found.append((item * math.prod(int(n) for n in dims.split(",") if n), dtype))
    return found


def array_bytes(type_text: str) -> int:
    """Returns the bytes of all arrays in a result type."""
    return sum(num_bytes for num_bytes, _ in arrays(type_text))


# ---- how often each computation is executed


def executions(computations: Computations) -> dict[str, int]:
    """Returns how often one run of the entry executes each computation.

    Fusions and the functions that reduce are left out: they are part of the instruction that calls
    them.
    """
    entry = next(name for name, body in computations.items() if body is computations["ENTRY"])
    times = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name]:
            if instruction.opcode == "while":
                iterations = _trip_count(instruction, computations[name], computations)
                visit(attribute(instruction, "body"), count * iterations)
            elif instruction.opcode in ("call", *ASYNCHRONOUS_CALLS):
                visit(called_computation(instruction), count)
            elif instruction.opcode == "conditional":
                # Which branch is taken depends on values, so all of them are counted, except where
                # the name says that a step hardly ever does more than nothing.
                if re.search(rf'op_name="[^"]*\b{SELDOM}\b', instruction.rest):
                    continue
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
                for branch in re.findall(r"[\w.\-]+", listed.group(1)) if listed else named:
                    visit(branch, count)

    visit(entry, 1)
    return times


def _trip_count(loop: Instruction, around: list[Instruction], computations: Computations) -> int:
    """Returns how many iterations a loop has.

    XLA states it for most loops, but not for those that it has changed: a loop whose first
    iteration was taken out begins at 1. There it follows from the constants between which the
    counter runs.

    Args:
        around: the computation in which the loop is.
    """
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated:
        return int(stated.group(1))
    condition = computations[attribute(loop, "condition")]
    fused = [attribute(i, "calls") for i in condition if i.opcode == "fusion"]
    compared = condition + [i for name in fused for i in computations[name]]
    # A loop that ends by what it has computed, as that of a sampler does, has no number.
    if any(i.opcode not in _OF_COUNTERS for i in compared):
        return 1
    limits = [
        int(i.operands[0])
        for i in compared
        if i.opcode == "constant" and i.operands and i.operands[0].isdigit()
    ]
    # The element of the loop's state that the condition reads is the counter.
    counters = [
        re.search(r"index=(\d+)", i.rest) for i in condition if i.opcode == "get-tuple-element"
    ]
    entering = next((i.operands for i in around if i.name == loop.operands[0]), ())
    start = None
    if len(counters) == 1:
        position = int(counters[0].group(1))  # type: ignore[union-attr]
        if position < len(entering):
            start = _constant(entering[position], around, computations)
    start = start or 0
    # Without a constant to compare with, one iteration: too few rather than an invented number.
    return max(limits, default=start + 1) - start


def _constant(name: str, body: list[Instruction], computations: Computations) -> int | None:
    """Returns the number that an instruction of a computation always has, None where that does not
    follow from constants, their copies and their sums, of which GPUs make fusions.
    """
    instruction = next((i for i in body if i.name == name), None)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        number = "".join(instruction.operands)
        return int(number) if number.lstrip("-").isdigit() else None
    if instruction.opcode == "fusion":
        inside = computations[attribute(instruction, "calls")]
        return _constant(next(i.name for i in inside if i.is_root), inside, computations)
    if instruction.opcode in (*CONVERSIONS, "add"):
        terms = [_constant(operand, body, computations) for operand in instruction.operands]
        return sum(terms) if None not in terms else None  # type: ignore[arg-type]
    return None


def root_opcode(instruction: Instruction, computations: Computations) -> str:
    """Returns the operation that makes the result, looked up inside of a fusion."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    body = computations[attribute(instruction, "calls")]
    inside = {i.name: i for i in body}
    root = next(i for i in body if i.is_root)
    while root.opcode in CONVERSIONS and root.operands[0] in inside:
        root = inside[root.operands[0]]
    return root_opcode(root, computations)
