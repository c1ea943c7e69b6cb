"""What a compiled program does, read from its HLO text: collectives with their bytes, and the
kernels it calls.

Nothing is run, so the program may be for devices that are not there. A collective inside of a loop
counts as often as the loop turns. XLA may write one kind of collective as another; the kind
reported is what the program achieves:

- TPUs gather over a whole slice by summing arrays that are zero outside of each device's own part
(an all-reduce of a
  dynamic-update-slice), and scatter by an all-reduce of which each device keeps a slice:
  "all-gather (as all-reduce)" and "reduce-scatter (as all-reduce)". Both move twice the bytes of
  the native form.
- A gather or scatter may be pulled apart and done in pieces within the product that needs it
(collective-permutes in a
  loop called windowed_dot_general): "all-gather (in pieces)" and "reduce-scatter (in pieces)".
- A collective that runs beside products is written in each of them, under one channel: it counts
once.
- Between TPU slices data is handed to the network by a `send` that says what is done with it.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|c64|c128|[su]\d+|f8\w*|f4\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")


class Instruction(NamedTuple):
    name: str
    type: str  # of the result, as written
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, as written
    is_root: bool


class Collective(NamedTuple):
    """One kind of communication at one place of a program.

    kind: see the module's docstring. num_bytes: of the whole array that is gathered, reduced or
    exchanged, once. times: how often a step executes it. group_size: devices that take part
    together (0: all). spans_slices: whether a group has devices of several slices, so that it uses
    the data centre network. dtype, where: element type and the name of the operation in the model
    that it belongs to.
    """

    kind: str
    num_bytes: int
    times: int
    group_size: int
    spans_slices: bool
    dtype: str
    where: str

    @property
    def total_bytes(self) -> int:
        return self.num_bytes * self.times


def parse(text: str) -> dict[str, list[Instruction]]:
    """Returns {computation: its instructions}; the entry computation is also found under "ENTRY"."""
    computations, body = {}, []
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            body = computations.setdefault(opened.group(1), [])
            if line.startswith("ENTRY"):
                computations["ENTRY"] = body
            continue
        found = _INSTRUCTION.match(line)
        opcode = _OPCODE.search(found.group(3)) if found else None
        if opcode:
            right = found.group(3)
            inside, _, rest = right[opcode.end() :].partition(")")
            operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
                re.findall(r"[\w.\-]+", inside)
            )
            body.append(
                Instruction(
                    found.group(2),
                    right[: opcode.start()],
                    opcode.group(1),
                    operands,
                    rest,
                    bool(found.group(1)),
                )
            )
    return computations


def collectives(text: str, *, devices_per_slice: int = 0) -> list[Collective]:
    """Returns the collectives of a compiled program (`compiled.as_text()`), those that are alike at
    one place added up.

    Args:
        devices_per_slice: devices 0 to n-1 are the first slice, and so on; 0: there is one slice.
    """
    computations = parse(text)
    counted = collections.Counter()
    for name, times in _executions(computations).items():
        channels = set()
        for place in [name, *_fused(name, computations)]:
            body = computations[place]
            by_name = {instruction.name: instruction for instruction in body}
            users = collections.defaultdict(list)
            for instruction in body:
                for operand in instruction.operands:
                    users[operand].append(instruction)
            for instruction in body:
                kind = instruction.opcode.removesuffix("-start")
                if kind == "send" and "_xla_megascale_transfer_type" in instruction.rest:
                    counted[_between_slices(instruction)] += times
                channel = re.search(r"channel_id=\d+", instruction.rest)
                if kind not in KINDS or (channel and channel.group() in channels):
                    continue
                channels |= {channel.group()} if channel else set()
                groups = _groups(instruction.rest)
                group_size = len(groups[0]) if groups else 0
                if group_size == 1:
                    continue  # nothing moves
                spans = bool(devices_per_slice) and any(
                    len({d // devices_per_slice for d in group}) > 1 for group in groups
                )
                where = re.search(r'op_name="([^"]*)"', instruction.rest)
                for num_bytes, dtype, index in _payloads(instruction, kind, group_size):
                    achieved = _achieves(
                        kind, instruction, index, by_name, users, computations, name
                    )
                    key = (
                        achieved,
                        num_bytes,
                        group_size,
                        spans,
                        dtype,
                        where.group(1) if where else "",
                    )
                    counted[key] += times
    return [
        Collective(kind, num_bytes, times, group_size, spans, dtype, where)
        for (kind, num_bytes, group_size, spans, dtype, where), times in sorted(
            counted.items(), key=lambda item: -item[0][1] * item[1]
        )
    ]


def kernels(text: str) -> dict[str, int]:
    """Returns {name of a custom kernel (Pallas, cuDNN): how many times a step calls it}."""
    computations = parse(text)
    counted = collections.Counter()
    for name, times in _executions(computations).items():
        for instruction in computations[name]:
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            if instruction.opcode == "custom-call" and target:
                if (
                    target.group(1) == "tpu_custom_call"
                ):  # Pallas: the instruction is named after the kernel
                    counted[re.sub(r"[.\d]+$", "", instruction.name)] += times
                elif re.search("triton|cudnn|fmha", target.group(1)):
                    counted[target.group(1)] += times
    return dict(counted)


# ---- reading the program


def _fused(name: str, computations) -> list[str]:
    """Returns the computations of the fusions in a computation."""
    return [_attribute(i, "calls") for i in computations[name] if i.opcode == "fusion"]


def _between_slices(send: Instruction) -> tuple:
    """Returns the fields of the Collective (without `times`) that a send between TPU slices is a
    part of.
    """
    kind = (
        re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
        .group(1)
        .lower()
        .replace("_", "-")
    )
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.rest)
    num_bytes, dtype = _arrays(send.type)[0]
    return kind, num_bytes, 0, True, dtype, name.group(1) if name else ""


def _executions(computations: dict[str, list[Instruction]]) -> dict[str, int]:
    """Returns how often each computation is executed by one run of the entry; fusions and reducers
    are left out.
    """
    entry = next(name for name, body in computations.items() if body is computations["ENTRY"])
    times = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name]:
            if instruction.opcode == "while":
                turns = _trip_count(instruction, computations[name], computations)
                visit(_attribute(instruction, "body"), count * turns)
            elif instruction.opcode in ("call", "async-start"):
                visit(
                    _attribute(instruction, "to_apply") or _attribute(instruction, "calls"), count
                )
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
                for branch in re.findall(r"[\w.\-]+", branches.group(1)) if branches else named:
                    visit(branch, count)  # which branch is taken is not known: all are counted

    visit(entry, 1)
    return times


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def _trip_count(loop: Instruction, around: list[Instruction], computations) -> int:
    """Returns how often a loop turns: what XLA states, or from the constants that its counter
    begins and ends at.

    Args:
        around: the computation that the loop stands in; a loop whose first turn was taken out
            begins at 1.
    """
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated:
        return int(stated.group(1))
    condition = computations[_attribute(loop, "condition")]
    limits = [
        int(i.operands[0])
        for i in condition
        if i.opcode == "constant" and i.operands and i.operands[0].isdigit()
    ]
    counters = [
        re.search(r"index=(\d+)", i.rest) for i in condition if i.opcode == "get-tuple-element"
    ]
    by_name = {instruction.name: instruction for instruction in around}
    start = 0
    if len(counters) == 1 and loop.operands[0] in by_name:
        entering = by_name[loop.operands[0]].operands
        first = (
            by_name.get(entering[int(counters[0].group(1))])
            if len(entering) > int(counters[0].group(1))
            else None
        )
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = by_name.get(first.operands[0])
        if first is not None and first.opcode == "constant":
            start = int(first.operands[0])
    return max(limits, default=start + 1) - start


def _groups(rest: str) -> list[list[int]]:
    """Returns the device numbers that take part together, from any of the ways that HLO writes
    them; [] for all.
    """
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if listed:
        return [
            [int(n) for n in group.split(",")]
            for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))
        ]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims = ([int(n) for n in iota.group(i).split(",")] for i in (1, 2))
        devices = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            devices = devices.transpose([int(n) for n in iota.group(3).split(",")])
        return devices.reshape(shape).tolist()
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? \{{([^}}]*)\}}", rest
    )
    if mesh:
        axes = re.findall(r"'(\w+)'=(\d+)", mesh.group(1))
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        devices = np.arange(math.prod(sizes))
        if mesh.group(2):
            devices = devices.reshape([int(n) for n in mesh.group(2).split(",")])
        if mesh.group(3):
            devices = devices.transpose([int(n) for n in mesh.group(3).split(",")])
        joined = [names.index(name) for name in re.findall(r"'(\w+)'", mesh.group(4))]
        devices = np.moveaxis(devices.reshape(sizes), joined, range(-len(joined), 0))
        return devices.reshape(-1, math.prod(sizes[i] for i in joined)).tolist()
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
    if pairs:
        return [
            [int(n) for n in pair.split(",")]
            for pair in re.findall(r"\{([\d, ]+)\}", pairs.group(1))
        ]
    return []


def _arrays(type_text: str) -> list[tuple[int, str]]:
    """Returns (bytes, dtype) of each array in a result type."""
    arrays = []
    for dtype, dims in _ARRAY.findall(type_text):
        item = _ITEM_BYTES.get(dtype) or max(1, int(re.search(r"\d+", dtype).group()) // 8)
        arrays.append((item * math.prod(int(n) for n in dims.split(",") if n), dtype))
    return arrays


def _payloads(instruction: Instruction, kind: str, group_size: int):
    """Yields (bytes of the whole array, dtype, position) for each array that a collective carries."""
    arrays = _arrays(instruction.type)
    if instruction.opcode == "collective-permute-start":
        arrays = arrays[:1]  # (source, target, two contexts)
    elif instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    for index, (num_bytes, dtype) in enumerate(arrays):
        yield (
            (num_bytes * max(group_size, 1) if kind == "reduce-scatter" else num_bytes),
            dtype,
            index,
        )


def _achieves(kind, instruction, index, by_name, users, computations, computation: str) -> str:
    """Returns the kind of collective that the instruction's `index`-th array amounts to; see the
    module's docstring.
    """
    if kind == "collective-permute" and "windowed_dot_general" in computation:
        return "all-gather (in pieces)" if "_ag" in computation else "reduce-scatter (in pieces)"
    if kind != "all-reduce":
        return kind
    source = by_name.get(instruction.operands[index]) if index < len(instruction.operands) else None
    while source is not None and source.opcode in ("bitcast", "copy", "copy-start", "copy-done"):
        source = by_name.get(source.operands[0])
    if source is not None and _root_opcode(source, computations) == "dynamic-update-slice":
        return "all-gather (as all-reduce)"
    results = [instruction]
    if instruction.type.startswith("("):
        results = [
            u
            for u in users[instruction.name]
            if u.opcode == "get-tuple-element" and f"index={index}" in u.rest
        ]
    readers = [(reader, result) for result in results for reader in users[result.name]]
    if readers and all(
        _takes_slice(reader, result.name, computations) for reader, result in readers
    ):
        return "reduce-scatter (as all-reduce)"
    return kind


def _root_opcode(instruction: Instruction, computations) -> str:
    """Returns the operation that makes the result, looked up inside of a fusion."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    body = computations[_attribute(instruction, "calls")]
    inside = {i.name: i for i in body}
    root = next(i for i in body if i.is_root)
    while root.opcode in ("bitcast", "copy", "convert") and root.operands[0] in inside:
        root = inside[root.operands[0]]
    return _root_opcode(root, computations)


def _takes_slice(reader: Instruction, name: str, computations) -> bool:
    """Whether an instruction, or the fusion that it stands for, reads only a dynamic-slice of the
    array `name`.
    """
    if reader.opcode == "dynamic-slice":
        return reader.operands[0] == name
    if reader.opcode != "fusion":
        return False
    body = computations[_attribute(reader, "calls")]
    numbers = {i for i, operand in enumerate(reader.operands) if operand == name}
    parameters = {i.name for i in body if i.opcode == "parameter" and int(i.operands[0]) in numbers}
    readers = [i for i in body if parameters & set(i.operands)]
    while readers and all(i.opcode in ("bitcast", "copy", "convert") for i in readers):
        passed = {i.name for i in readers}
        readers = [i for i in body if passed & set(i.operands)]
    return bool(readers) and all(i.opcode == "dynamic-slice" for i in readers)
