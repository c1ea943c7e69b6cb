"""Reads what a compiled program does from its HLO text: collectives with their bytes, and kernels.

Nothing is run, so the program may be for devices that are not there. JAX has no public API for the
instructions of a compiled program; its text is public, and it is what people look at too.

A collective inside of a loop counts once per iteration. XLA may write one kind of collective as
another; the kind reported here is what the program achieves:

- TPUs gather over a whole slice by summing arrays that are zero outside of each device's own part
  (an all-reduce of a dynamic-update-slice), and scatter by an all-reduce of which each device keeps
  a
  slice: "all-gather (as all-reduce)" and "reduce-scatter (as all-reduce)". Both move twice the
  bytes of the native form.
- A gather or scatter may be taken apart and done in pieces within the product that needs it
  (collective-permutes in a loop called windowed_dot_general): "all-gather (in pieces)" and
  "reduce-scatter (in pieces)".
- A collective that overlaps with products is written in each of their fusions, under one channel:
  it counts once.
- Between TPU slices data is handed to the network by a `send`, whose attributes say what is done
  with it.

The forms were found by reading programs of libtpu 0.0.42. A form that is not recognised is reported
under the opcode it has, so that its bytes are never lost.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

# Operations that change the layout or the element type of an array and not what it holds. XLA puts
# them anywhere between a collective and what gives it its meaning.
_COPIES = ("bitcast", "copy", "copy-start", "copy-done")
_CONVERSIONS = ("bitcast", "copy", "convert")

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


# {name of a computation: its instructions}
Computations = dict[str, list[Instruction]]


class Collective(NamedTuple):
    """One kind of communication at one place of a program.

    kind: see the module's docstring. num_bytes: of the whole array that is gathered, reduced or
    exchanged, once. times: how often a step executes it. group_size: how many devices take part
    together (0: all of them). spans_slices: whether a group has devices of several slices, so that
    it uses the data centre network. dtype: the element type. where: the name of the operation in
    the model that it belongs to.
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


def collectives(text: str, *, devices_per_slice: int = 0) -> list[Collective]:
    """Returns the collectives of a compiled program, the ones that move the most bytes first.

    Those that are alike at one place are added up.

    Args:
        text: `compiled.as_text()`.
        devices_per_slice: devices 0 to n-1 are the first slice, and so on; 0: there is one slice.
    """
    computations = _parse(text)
    counted = collections.Counter()
    for name, times in _executions(computations).items():
        for found in _collectives_in(name, computations, devices_per_slice):
            counted[found] += times
    return sorted(
        (one._replace(times=times) for one, times in counted.items()),
        key=lambda one: -one.total_bytes,
    )


def kernels(text: str) -> dict[str, int]:
    """Returns {name of a custom kernel (Pallas, cuDNN): its number of calls per step}."""
    computations = _parse(text)
    counted = collections.Counter()
    for name, times in _executions(computations).items():
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


# ---- from text to instructions


def _parse(text: str) -> Computations:
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


def _attribute(instruction: Instruction, name: str) -> str:
    """Returns the computation that an attribute names, "" without the attribute."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def _arrays(type_text: str) -> list[tuple[int, str]]:
    """Returns (bytes, dtype) of each array in a result type."""
    arrays = []
    for dtype, dims in _ARRAY.findall(type_text):
        item = _ITEM_BYTES.get(dtype) or max(1, int(re.search(r"\d+", dtype).group()) // 8)  # type: ignore[union-attr]
        arrays.append((item * math.prod(int(n) for n in dims.split(",") if n), dtype))
    return arrays


# ---- how often each computation is executed


def _executions(computations: Computations) -> dict[str, int]:
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
                visit(_attribute(instruction, "body"), count * iterations)
            elif instruction.opcode in ("call", "async-start"):
                called = _attribute(instruction, "to_apply") or _attribute(instruction, "calls")
                visit(called, count)
            elif instruction.opcode == "conditional":
                # Which branch is taken depends on values, so all of them are counted.
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
    condition = computations[_attribute(loop, "condition")]
    limits = [
        int(i.operands[0])
        for i in condition
        if i.opcode == "constant" and i.operands and i.operands[0].isdigit()
    ]
    # The element of the loop's state that the condition reads is the counter.
    counters = [
        re.search(r"index=(\d+)", i.rest) for i in condition if i.opcode == "get-tuple-element"
    ]
    by_name = {instruction.name: instruction for instruction in around}
    start = 0
    if len(counters) == 1 and loop.operands[0] in by_name:
        entering = by_name[loop.operands[0]].operands
        position = int(counters[0].group(1))  # type: ignore[union-attr]
        first = by_name.get(entering[position]) if position < len(entering) else None
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = by_name.get(first.operands[0])
        if first is not None and first.opcode == "constant":
            start = int(first.operands[0])
    # Without a constant to compare with, one iteration: too few rather than an invented number.
    return max(limits, default=start + 1) - start


# ---- collectives


def _collectives_in(name: str, computations: Computations, devices_per_slice: int):
    """Yields the Collectives of one computation and of its fusions, with `times` 0."""
    # The fusions among which one overlapped collective is spread share its channel.
    channels = set()
    fusions = [_attribute(i, "calls") for i in computations[name] if i.opcode == "fusion"]
    for place in [name, *fusions]:
        body = computations[place]
        by_name = {instruction.name: instruction for instruction in body}
        users = collections.defaultdict(list)
        for instruction in body:
            for operand in instruction.operands:
                users[operand].append(instruction)
        for instruction in body:
            kind = instruction.opcode.removesuffix("-start")
            if kind == "send" and "_xla_megascale_transfer_type" in instruction.rest:
                yield _between_slices(instruction)
            channel = re.search(r"channel_id=\d+", instruction.rest)
            if kind not in _KINDS or (channel and channel.group() in channels):
                continue
            if channel:
                channels.add(channel.group())
            groups = _groups(instruction.rest)
            group_size = len(groups[0]) if groups else 0
            if group_size == 1:
                continue  # every device is alone: nothing moves
            spans_slices = bool(devices_per_slice) and any(
                len({device // devices_per_slice for device in group}) > 1 for group in groups
            )
            where = re.search(r'op_name="([^"]*)"', instruction.rest)
            for num_bytes, dtype, index in _payloads(instruction, kind, group_size):
                yield Collective(
                    kind=_achieved_kind(
                        kind, instruction, index, by_name, users, computations, name
                    ),
                    num_bytes=num_bytes,
                    times=0,
                    group_size=group_size,
                    spans_slices=spans_slices,
                    dtype=dtype,
                    where=where.group(1) if where else "",
                )


def _between_slices(send: Instruction) -> Collective:
    """Returns the Collective, with `times` 0, that a send between TPU slices is a part of.

    The matching `recv` is not counted: it is the same transfer, seen from the other slice.
    """
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.rest)
    num_bytes, dtype = _arrays(send.type)[0]
    return Collective(
        kind=transfer.group(1).lower().replace("_", "-"),  # type: ignore[union-attr]
        num_bytes=num_bytes,
        times=0,
        group_size=0,
        spans_slices=True,
        dtype=dtype,
        where=name.group(1) if name else "",
    )


def _groups(rest: str) -> list[list[int]]:
    """Returns the device numbers that take part together, from any notation of HLO; [] for all."""
    # {{0,1},{2,3}}
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    if listed:
        return [
            [int(n) for n in group.split(",")]
            for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))
        ]
    # [2,2]<=[4]T(1,0): the numbers 0, 1, ... in this shape, transposed and reshaped
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims = ([int(n) for n in iota.group(i).split(",")] for i in (1, 2))
        devices = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            devices = devices.transpose([int(n) for n in iota.group(3).split(",")])
        return devices.reshape(shape).tolist()
    # mesh['a'=2,'b'=2] {'b'}: devices along axis b of a mesh, in the order of device_ids if given
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
    # collective-permute: {{0,1},{1,0}}, who sends to whom
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
    if pairs:
        return [
            [int(n) for n in pair.split(",")]
            for pair in re.findall(r"\{([\d, ]+)\}", pairs.group(1))
        ]
    return []


def _payloads(instruction: Instruction, kind: str, group_size: int):
    """Yields (bytes of the whole array, dtype, position) of each array that is carried."""
    arrays = _arrays(instruction.type)
    # An asynchronous start lists more than its results, and each kind lists them in its own way.
    if instruction.opcode == "collective-permute-start":
        arrays = arrays[:1]  # (source, target, two contexts)
    elif instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # (operands, results)
    # The result of a scatter is a shard; the whole array is as many times larger.
    factor = max(group_size, 1) if kind == "reduce-scatter" else 1
    for index, (num_bytes, dtype) in enumerate(arrays):
        yield num_bytes * factor, dtype, index


def _achieved_kind(kind, instruction, index, by_name, users, computations, computation: str) -> str:
    """Returns the kind of collective that the instruction's `index`-th array amounts to.

    See the module's docstring for what XLA writes instead of what. Several arrays are often
    reduced together, and each of them may amount to something else.

    Args:
        by_name, users: instructions of the same body by name, and by the operand that they read.
        computation: the name of the loop body or entry in which the instruction is executed.
    """
    if kind == "collective-permute" and "windowed_dot_general" in computation:
        return "all-gather (in pieces)" if "_ag" in computation else "reduce-scatter (in pieces)"
    if kind != "all-reduce":
        return kind
    # A gather: the operand is zero except for this device's part, which was written into it.
    source = by_name.get(instruction.operands[index]) if index < len(instruction.operands) else None
    while source is not None and source.opcode in _COPIES:
        source = by_name.get(source.operands[0])
    if source is not None and _root_opcode(source, computations) == "dynamic-update-slice":
        return "all-gather (as all-reduce)"
    # A scatter: everything that reads the result takes only a slice of it. One reader of the whole
    # is enough to make it a true all-reduce.
    results = [instruction]
    if instruction.type.startswith("("):
        results = [
            user
            for user in users[instruction.name]
            if user.opcode == "get-tuple-element" and f"index={index}" in user.rest
        ]
    readers = [(reader, result) for result in results for reader in users[result.name]]
    if readers and all(
        _takes_slice(reader, result.name, computations) for reader, result in readers
    ):
        return "reduce-scatter (as all-reduce)"
    return kind


def _root_opcode(instruction: Instruction, computations: Computations) -> str:
    """Returns the operation that makes the result, looked up inside of a fusion."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    body = computations[_attribute(instruction, "calls")]
    inside = {i.name: i for i in body}
    root = next(i for i in body if i.is_root)
    while root.opcode in _CONVERSIONS and root.operands[0] in inside:
        root = inside[root.operands[0]]
    return _root_opcode(root, computations)


def _takes_slice(reader: Instruction, name: str, computations: Computations) -> bool:
    """Whether an instruction, or the fusion it calls, reads only a slice of the array `name`."""
    if reader.opcode == "dynamic-slice":
        return reader.operands[0] == name
    if reader.opcode != "fusion":
        return False
    # Inside of the fusion the array is a parameter, found by its position among the operands.
    body = computations[_attribute(reader, "calls")]
    numbers = {i for i, operand in enumerate(reader.operands) if operand == name}
    parameters = {i.name for i in body if i.opcode == "parameter" and int(i.operands[0]) in numbers}
    readers = [i for i in body if parameters & set(i.operands)]
    while readers and all(i.opcode in _CONVERSIONS for i in readers):
        passed = {i.name for i in readers}
        readers = [i for i in body if passed & set(i.operands)]
    return bool(readers) and all(i.opcode == "dynamic-slice" for i in readers)
