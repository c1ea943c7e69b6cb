"""Reads from the text of a compiled program what its devices exchange, and whether they compute
meanwhile.

Nothing is run, so the program may be for devices that are not there.

A collective inside of a loop counts once per iteration. XLA may write one kind of collective as
another; the kind reported here is what the program achieves:

- TPUs gather over a whole slice by summing arrays that are zero outside of each device's own part
  (an all-reduce of a dynamic-update-slice), and scatter by an all-reduce of which each device keeps
  a slice: "all-gather (as all-reduce)" and "reduce-scatter (as all-reduce)". Both move twice the
  bytes of the native form.
- A gather or scatter may be taken apart and done in pieces within the product that needs it
  (collective-permutes in a loop called windowed_dot_general): "all-gather (in pieces)" and
  "reduce-scatter (in pieces)".
- A collective that overlaps with products is written in each of their fusions, under one channel:
  it counts once.
- Between TPU slices data is handed to the network by a `send`, whose attributes say what is done
  with it.

An asynchronous collective is written as a start and a done, or it stands alone in a computation
that is called so: a TPU does it on its SparseCores, between a call-start and a call-done. The text
of a compiled program is in the order of its schedule, so what lies between the two is what a device
does while the collective is under way: with a matrix product there, it is overlapped.

The forms were found by reading programs of libtpu 0.0.42 and of XLA for GPUs in jax 0.10.2. A form
that is not recognised is reported under the opcode it has, so that its bytes are never lost.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from llada_jax.planning.hlo import (
    ASYNCHRONOUS_CALLS,
    CONVERSIONS,
    Computations,
    Instruction,
    arrays,
    attribute,
    called_computation,
    executions,
    parse,
    root_opcode,
)

_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

# Operations that change the layout of an array and not what it holds. XLA puts them anywhere
# between a collective and what gives it its meaning.
_COPIES = ("bitcast", "copy", "copy-start", "copy-done")

# A product of matrices in the text: an instruction, or a call of a library or of a kernel.
_PRODUCTS = ("dot", "convolution", "ragged-dot")
_PRODUCT_CALLS = re.compile(
    r'custom_call_target="[^"]*(?:cublas|gemm|cudnn|triton|tpu_custom_call)'
)


class Collective(NamedTuple):
    """One kind of communication at one place of a program.

    kind: see the module's docstring. num_bytes: of the whole array that is gathered, reduced or
    exchanged, once. times: how often a step executes it. group_size: how many devices take part
    together (0: all of them). axes: the mesh axes along which they lie, joined by "+" ("" where the
    mesh is not known). spans_slices: whether a group has devices of several slices, so that it uses
    the data centre network. is_asynchronous: the devices may compute meanwhile. is_overlapped: the
    schedule has a matrix product there. dtype: the element type. where: the name of the operation
    in the model that it belongs to.
    """

    kind: str
    num_bytes: int
    times: int
    group_size: int
    axes: str
    spans_slices: bool
    is_asynchronous: bool
    is_overlapped: bool
    dtype: str
    where: str

    @property
    def total_bytes(self) -> int:
        return self.num_bytes * self.times


class Program(NamedTuple):
    """A parsed program and what is looked up in it.

    with_products: the computations that hold a matrix product. started_by: {computation that an
    asynchronous call runs: (that instruction, the computation it is in)}.
    """

    computations: Computations
    with_products: set[str]
    started_by: dict[str, tuple[Instruction, str]]


def collectives(
    text: str, *, devices_per_slice: int = 0, shape: dict[str, int] | None = None
) -> list[Collective]:
    """Returns the collectives of a compiled program, the ones that move the most bytes first.

    Those that are alike at one place are added up.

    Args:
        text: `compiled.as_text()`.
        devices_per_slice: devices 0 to n-1 are the first slice, and so on; 0: there is one slice.
        shape: {mesh axis: size}, for the axes; the devices are numbered in the order of the mesh.
    """
    computations = parse(text)
    started_by = {
        called_computation(instruction): (instruction, name)
        for name, body in computations.items()
        for instruction in body
        if instruction.opcode in ASYNCHRONOUS_CALLS
    }
    program = Program(computations, _with_products(computations), started_by)
    counted = collections.Counter()
    for name, times in executions(computations).items():
        for found in _collectives_in(name, program, devices_per_slice, shape or {}):
            counted[found] += times
    return sorted(
        (one._replace(times=times) for one, times in counted.items()),
        key=lambda one: -one.total_bytes,
    )


def _collectives_in(name: str, program: Program, devices_per_slice: int, shape: dict[str, int]):
    """Yields the Collectives of one computation and of its fusions, with `times` 0."""
    computations = program.computations
    # The instructions among which one collective is spread share its channel. So do all collectives
    # that a shard_map has asked for, each of which counts.
    channels = set()
    fusions = [attribute(i, "calls") for i in computations[name] if i.opcode == "fusion"]
    spread = collections.defaultdict(list)
    for fusion in fusions:
        for channel in {_channel(i) for i in computations[fusion]} - {""}:
            spread[channel].append(fusion)
    for place in [name, *fusions]:
        body = computations[place]
        by_name = {instruction.name: instruction for instruction in body}
        users = collections.defaultdict(list)
        for instruction in body:
            for operand in instruction.operands:
                users[operand].append(instruction)
        for instruction in body:
            kind, channel = instruction.opcode.removesuffix("-start"), _channel(instruction)
            if kind == "send" and "_xla_megascale_transfer_type" in instruction.rest:
                yield _between_slices(instruction, _overlap(instruction, place, program))
            where = re.search(r'op_name="([^"]*)"', instruction.rest)
            is_asked_for = where is not None and "shard_map" in where.group(1)
            is_part = channel in channels and not (is_asked_for and place == name)
            if kind not in _KINDS or is_part:
                continue
            if channel:
                channels.add(channel)
            groups = _groups(instruction.rest)
            group_size = len(groups[0]) if groups else 0
            if group_size == 1:
                # Every device is alone: nothing moves.
                continue
            spans_slices = bool(devices_per_slice) and any(
                len({device // devices_per_slice for device in group}) > 1 for group in groups
            )
            is_asynchronous, is_overlapped = _overlap(instruction, place, program)
            if len(spread[channel]) > 1:
                is_asynchronous = True
                is_overlapped = any(fusion in program.with_products for fusion in spread[channel])
            for num_bytes, dtype, index in _payloads(instruction, kind, group_size):
                yield Collective(
                    kind=_achieved_kind(
                        kind, instruction, index, by_name, users, computations, name
                    ),
                    num_bytes=num_bytes,
                    times=0,
                    group_size=group_size,
                    axes=_axes(groups, shape),
                    spans_slices=spans_slices,
                    is_asynchronous=is_asynchronous,
                    is_overlapped=is_overlapped,
                    dtype=dtype,
                    where=where.group(1) if where else "",
                )


def _channel(instruction: Instruction) -> str:
    """Returns the channel of a collective, "" where it has none."""
    found = re.search(r"channel_id=\d+", instruction.rest)
    return found.group() if found else ""


def _between_slices(send: Instruction, overlap: tuple[bool, bool]) -> Collective:
    """Returns the Collective, with `times` 0, that a send between TPU slices is a part of.

    The matching `recv` is not counted: it is the same transfer, seen from the other slice.
    """
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.rest)
    num_bytes, dtype = arrays(send.type)[0]
    return Collective(
        kind=transfer.group(1).lower().replace("_", "-"),  # type: ignore[union-attr]
        num_bytes=num_bytes,
        times=0,
        group_size=0,
        # along which slices are joined
        axes="data",
        spans_slices=True,
        is_asynchronous=overlap[0],
        is_overlapped=overlap[1],
        dtype=dtype,
        where=name.group(1) if name else "",
    )


def _axes(groups: list[list[int]], shape: dict[str, int]) -> str:
    """Returns the mesh axes along which the devices of a group lie, joined by "+"."""
    if not shape:
        return ""
    # Without groups, all devices are meant.
    if not groups:
        return "+".join(axis for axis, size in shape.items() if size > 1)
    varies = [False] * len(shape)
    for group in groups:
        places = np.unravel_index(group, tuple(shape.values()))
        varies = [v or len(set(place.tolist())) > 1 for v, place in zip(varies, places)]
    return "+".join(axis for axis, v in zip(shape, varies) if v)


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
    listed = arrays(instruction.type)
    # An asynchronous start lists more than its results, and each kind lists them in its own way.
    if instruction.opcode == "collective-permute-start":
        # What is listed is (source, target, two contexts).
        listed = listed[:1]
    elif instruction.opcode.endswith("-start") and kind != "all-reduce":
        # What is listed is (operands, results).
        listed = listed[len(listed) // 2 :]
    # The result of a scatter is a shard; the whole array is as many times larger.
    factor = max(group_size, 1) if kind == "reduce-scatter" else 1
    for index, (num_bytes, dtype) in enumerate(listed):
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
    if source is not None and root_opcode(source, computations) == "dynamic-update-slice":
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


def _takes_slice(reader: Instruction, name: str, computations: Computations) -> bool:
    """Whether an instruction, or the fusion it calls, reads only a slice of the array `name`."""
    if reader.opcode == "dynamic-slice":
        return reader.operands[0] == name
    if reader.opcode != "fusion":
        return False
    # Inside of the fusion the array is a parameter, found by its position among the operands.
    body = computations[attribute(reader, "calls")]
    numbers = {i for i, operand in enumerate(reader.operands) if operand == name}
    parameters = {i.name for i in body if i.opcode == "parameter" and int(i.operands[0]) in numbers}
    readers = [i for i in body if parameters & set(i.operands)]
    while readers and all(i.opcode in CONVERSIONS for i in readers):
        passed = {i.name for i in readers}
        readers = [i for i in body if passed & set(i.operands)]
    return bool(readers) and all(i.opcode == "dynamic-slice" for i in readers)


# ---- what is done meanwhile


def _with_products(computations: Computations) -> set[str]:
    """Returns the computations that hold a matrix product, themselves or in what they call."""
    known: dict[str, bool] = {}

    def holds(name: str) -> bool:
        if name not in known:
            known[name] = False
            known[name] = any(
                instruction.opcode in _PRODUCTS
                or _PRODUCT_CALLS.search(instruction.rest) is not None
                or any(called in computations and holds(called) for called in _called(instruction))
                for instruction in computations[name]
            )
        return known[name]

    return {name for name in computations if holds(name)}


def _called(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction executes; those that reduce hold no products."""
    return [attribute(instruction, name) for name in ("calls", "body", "to_apply")]


def _overlap(instruction: Instruction, place: str, program: Program) -> tuple[bool, bool]:
    """Returns (is asynchronous, has a matrix product between start and done) of a collective.

    Args:
        place: the computation in which it stands.
    """
    if place in program.started_by:
        instruction, place = program.started_by[place]
    if not instruction.opcode.endswith("-start") and instruction.opcode != "send":
        return False, False
    body = program.computations[place]
    begun = body.index(instruction)
    # Without a done in the same computation the next iteration of the loop waits for it.
    ended = next(
        (
            number
            for number, other in enumerate(body)
            if other.opcode.endswith("-done") and instruction.name in other.operands
        ),
        len(body),
    )
    between = body[begun + 1 : ended]
    return True, any(_is_product(other, program) for other in between)


def _is_product(instruction: Instruction, program: Program) -> bool:
    """Whether an instruction is a matrix product or executes one."""
    return (
        instruction.opcode in _PRODUCTS
        or _PRODUCT_CALLS.search(instruction.rest) is not None
        or any(called in program.with_products for called in _called(instruction))
    )
