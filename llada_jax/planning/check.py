"""Compiles a train step for absent devices and checks the program against the estimate.

The estimate says what the mesh is meant to exchange; the compiler decides what is exchanged. The
partitioner may gather a weight a third time or exchange an activation between two layouts without a
word, and the step is then slow for a reason that no loss curve shows. Each check names one such
surprise. A check that is not ok is a reason to look at the program; it is not an error.
"""

import re
import time

import jax
from jax.sharding import Mesh

from llada_jax.cluster.hardware import Slice
from llada_jax.planning.collectives import collectives
from llada_jax.planning.compiled_program import kernels, layout_copies
from llada_jax.training.step import OPTIMIZER, Recipe, compile_step
from llada_jax.units import format_bytes

_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# How much more than the estimate is still ok. Weights and gradients: the compiler gathers a matrix
# once more where two products want it in two layouts (14% more if attention's are). Between
# slices the embedding's gradient travels too, and the head's in float32.
_GATHER_MARGIN = 1.3
_BETWEEN_SLICES_MARGIN = 2.5
# Shares of all bytes that may move in the dtype that was not meant (norms are gathered in float32)
# and that may be exchanged between layouts (tokens, segment ids and small activations are).
_OTHER_DTYPE_SHARE = 0.01
# Below this a gather is one of norms, which are float32 on purpose.
_SMALL_BYTES = 2**20
_RESHARD_SHARE = 0.05


def compile_report(recipe: Recipe, mesh: Mesh, machines: Slice, *, shape: tuple[int, int]) -> dict:
    """Compiles the train step for a mesh of absent devices and returns what the compiler says.

    Args:
        mesh: see llada_jax.planning.absent_devices.absent_mesh; the recipe is made for it.
        shape: (batch_size, sequence_length).

    Returns JSON values. fits: whether the program fits the memory of a device. If not: needed_bytes
    and usable_bytes. If so: seconds (of compiling), peak_bytes (the most that is in use at one
    time), usable_bytes, collectives (see llada_jax.planning.collectives), kernels and layout_copies
    (see llada_jax.planning.compiled_program).
    """
    began = time.perf_counter()
    usable = machines.accelerator.usable_bytes_per_device
    with jax.set_mesh(mesh):
        try:
            compiled = compile_step(recipe, shape)
        except jax.errors.JaxRuntimeError as error:
            needed, usable = parse_out_of_memory(str(error))
            if not needed:
                raise
            return {"fits": False, "needed_bytes": needed, "usable_bytes": usable}
    peak = compiled.memory_analysis().peak_memory_in_bytes
    # XLA for GPUs does not refuse a program that is too large; the run then fails.
    if peak > usable:
        return {"fits": False, "needed_bytes": peak, "usable_bytes": usable}
    text = compiled.as_text()
    found = collectives(text, devices_per_slice=machines.num_devices, shape=dict(mesh.shape))
    return {
        "fits": True,
        "seconds": time.perf_counter() - began,
        "peak_bytes": peak,
        "usable_bytes": usable,
        "collectives": [{**c._asdict(), "total_bytes": c.total_bytes} for c in found],
        "kernels": kernels(text),
        "layout_copies": layout_copies(text)._asdict(),
    }


def parse_out_of_memory(message: str) -> tuple[int, int]:
    """Returns (bytes needed, bytes available) from the compiler's message, (0, 0) for another
    error.

    Too large a program is the one failure that a plan answers with advice, and XLA raises it under
    the same error class as everything else: only its words tell it apart.
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    if not found:
        return 0, 0
    needed, available = (int(float(found[i]) * _UNIT[found[i + 1]]) for i in (1, 3))
    return needed, available


def check_program(report: dict, estimate: dict) -> list[dict]:
    """Compares a compiled program with what its mesh is meant to do.

    Args:
        report: from `compile_report`, of a program that fits.
        estimate: from llada_jax.planning.estimate.estimate_run, of the same run.

    Returns [{"what": what was checked, "ok": whether it is as meant, "words": the numbers}].
    """
    meant = estimate["traffic"]
    # What Muon exchanges would be taken for weights in float32.
    found = [
        c
        for c in report["collectives"]
        if not (meant["optimizer"] and f"{OPTIMIZER}/" in c["where"])
    ]
    moved = bytes_by_purpose(found)
    everything = sum(moved.values()) or 1
    results = []

    def check(what: str, ok: bool, words: str) -> None:
        results.append({"what": what, "ok": bool(ok), "words": words})

    def against(actual: float, expected: float, note: str = "") -> str:
        return f"{format_bytes(actual)} per step, {format_bytes(expected)} meant{note}"

    if meant["gather"]:
        check(
            "weights gathered",
            moved["gather"] < _GATHER_MARGIN * meant["gather"],
            against(moved["gather"], meant["gather"], " (twice per microbatch)"),
        )
        # A gather in float32 moves twice the bytes: the cast to bfloat16 came after it, not before.
        # Over tensor alone no weight is gathered.
        wide = sum(
            c["total_bytes"]
            for c in found
            if c["kind"].startswith("all-gather")
            and c["axes"] != "tensor"
            and c["dtype"] == "f32"
            and c["total_bytes"] > _SMALL_BYTES
        )
        is_narrow = estimate["dtype"] == "float32" or wide < _OTHER_DTYPE_SHARE * everything
        words = estimate["dtype"] if is_narrow else f"float32: {format_bytes(wide)} per step"
        check("gathered in", is_narrow, words)
    if meant["scatter"]:
        # An all-reduce whose result every device cuts down is a scatter in disguise. It can be
        # counted as one only where nothing else is meant to be reduced.
        is_only_reduction = not meant["data"] + meant["dcn"]
        scattered = moved["scatter"] + (moved["reduce"] if is_only_reduction else 0)
        check(
            "gradients scattered",
            scattered < _GATHER_MARGIN * meant["scatter"],
            against(scattered, meant["scatter"], " (once per microbatch)"),
        )
        if is_only_reduction and estimate["gradient_dtype"] == "float32":
            narrow = sum(
                c["total_bytes"]
                for c in found
                if c["kind"].startswith(("reduce-scatter", "all-reduce")) and c["dtype"] == "bf16"
            )
            is_wide = narrow < _OTHER_DTYPE_SHARE * everything
            words = "float32" if is_wide else f"bfloat16: {format_bytes(narrow)} per step"
            check("gradients summed in", is_wide, words)
    elif meant["data"]:
        # With a large vocabulary the embedding's gradient is as large as those of all layers.
        expected = meant["data"] + estimate["other_gradients"]
        check(
            "gradients reduced",
            moved["reduce"] < _GATHER_MARGIN * expected,
            against(moved["reduce"], expected),
        )
    if meant["sequence"]:
        # Matrices are gathered over fsdp and sequence together, and nothing tells them apart from
        # rows where fsdp is 1.
        is_shared = estimate["mesh"]["fsdp"] == 1
        expected = meant["sequence"] + (meant["gather"] + meant["scatter"] if is_shared else 0)
        check(
            "rows exchanged",
            moved["sequence"] < _GATHER_MARGIN * expected,
            against(moved["sequence"], expected),
        )
    if meant["dcn"]:
        sent, expected = format_bytes(moved["between"]), format_bytes(meant["dcn"])
        check(
            "between slices",
            moved["between"] < _BETWEEN_SLICES_MARGIN * meant["dcn"],
            f"{sent} per device and step, {expected} meant",
        )
    share = moved["reshard"] / everything
    check(
        "resharded",
        share < _RESHARD_SHARE,
        f"{format_bytes(moved['reshard'])} per step exchanged between layouts ({100 * share:.1f}%)",
    )
    replicated = estimate["replicated"]
    check("replicated", not replicated, ", ".join(replicated) or "no large parameter")
    check("attention kernel", *_check_attention(report["kernels"], estimate["attention"]))
    return results


# Words in the names of the calls by which each attention kernel is in a program.
_KERNEL_WORDS = {"splash": "splash", "cudnn": "fmha", "triton": "triton"}


def _check_attention(kernels: dict[str, int], attention: str) -> tuple[bool, str]:
    """Returns (ok, words) for the attention kernel that a program calls."""
    if attention not in _KERNEL_WORDS:
        return False, f"{attention}: the scores of all positions are held in memory"
    word = _KERNEL_WORDS[attention]
    called = {name: times for name, times in sorted(kernels.items()) if word in name}
    words = ", ".join(f"{name} x {times}" for name, times in called.items())
    return bool(called), words or f"{attention} is not in the program"


def bytes_by_purpose(collectives: list[dict]) -> dict[str, int]:
    """Returns the bytes per step that are moved for each purpose.

    Purposes: sequence, tensor (over that axis alone); gather, scatter, reduce; reshard (exchanged
    between layouts: everything else that stays within a slice); between (whatever crosses from one
    slice to another).
    """
    purposes = {"all-gather": "gather", "reduce-scatter": "scatter", "all-reduce": "reduce"}
    names = ("sequence", "tensor", "gather", "scatter", "reduce", "reshard", "between")
    totals = dict.fromkeys(names, 0)
    for c in collectives:
        # A kind may be "all-gather (as all-reduce)".
        kind = c["kind"].partition(" ")[0]
        is_of_axis = c["axes"] in ("sequence", "tensor")
        purpose = c["axes"] if is_of_axis else purposes.get(kind, "reshard")
        purpose = "between" if c["spans_slices"] else purpose
        totals[purpose] += c["total_bytes"]
    return totals
