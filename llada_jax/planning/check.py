"""What the compiler says about a train step for absent devices, next to the estimate."""

from llada_jax.cluster.hardware import Slice
from llada_jax.planning import absent_devices
from llada_jax.planning.estimate import arithmetic
from llada_jax.training.step import make_recipe
from llada_jax.units import format_bytes


def compiled(config, machines: Slice, num_slices: int, vocab_size: int) -> dict:
    """Returns aot.compile_report of a config with `checks`: [(what, whether it is as meant, in
    words)].
    """
    mesh = absent_devices.absent_mesh(config.mesh, machines, num_slices)
    recipe = make_recipe(config, absent_devices.mask_token_stand_in(vocab_size), mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    report = absent_devices.compile_report(recipe, mesh, machines, shape=shape)
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
            c["total_bytes"]
            for c in report["collectives"]
            if c["kind"].startswith("all-gather")
            and c["dtype"] == "f32"
            and c["total_bytes"] > 2**20
        )
        words = f"{format_bytes(totals['gather'])} a step, {format_bytes(traffic['gather'])} meant (twice each microbatch)"
        check("weights gathered", totals["gather"] < 1.3 * traffic["gather"], words)
        narrow = meant["dtype"] == "float32" or wide < 0.01 * whole
        check(
            "gathered in",
            narrow,
            meant["dtype"] if narrow else f"float32: {format_bytes(wide)} a step",
        )
    if traffic["scatter"]:
        reduced = totals["scatter"] + (
            totals["reduce"] if not traffic["data"] + traffic["dcn"] + traffic["tensor"] else 0
        )
        words = f"{format_bytes(reduced)} a step, {format_bytes(traffic['scatter'])} meant (once each microbatch)"
        check("gradients scattered", reduced < 1.3 * traffic["scatter"], words)
    elif traffic["data"]:
        words = f"{format_bytes(totals['reduce'])} a step, {format_bytes(traffic['data'])} meant"
        check(
            "gradients reduced",
            totals["reduce"] < 1.3 * traffic["data"] + traffic["tensor"] * 1.5,
            words,
        )
    if traffic["dcn"]:
        words = f"{format_bytes(totals['between'])} a device and step, {format_bytes(traffic['dcn'])} meant"
        check("between slices", totals["between"] < 2.5 * traffic["dcn"], words)
    check(
        "resharded",
        totals["reshard"] < 0.05 * whole,
        f"{format_bytes(totals['reshard'])} a step exchanged between layouts "
        f"({100 * totals['reshard'] / whole:.1f}%)",
    )
    check(
        "replicated",
        not meant["replicated"],
        ", ".join(meant["replicated"]) or "no large parameter",
    )
    splash = {name: times for name, times in report["kernels"].items() if "splash" in name}
    if meant["attention"] == "splash":
        words = (
            ", ".join(f"{name} x {times}" for name, times in sorted(splash.items()))
            or "splash is not in the program"
        )
        check("attention kernel", splash, words)
    else:
        check(
            "attention kernel",
            False,
            f"{meant['attention']}: the scores of all positions are held in memory",
        )
    return found


def totals_by_purpose(collectives: list[dict]) -> dict[str, int]:
    """Returns bytes a step that are gathered, scattered, reduced, exchanged between layouts, and
    sent between slices.
    """
    totals = dict.fromkeys(("gather", "scatter", "reduce", "reshard", "between"), 0)
    for c in collectives:
        kind = c["kind"].partition(" ")[0]
        purpose = {"all-gather": "gather", "reduce-scatter": "scatter", "all-reduce": "reduce"}.get(
            kind, "reshard"
        )
        totals["between" if c["spans_slices"] else purpose] += c["total_bytes"]
    return totals
