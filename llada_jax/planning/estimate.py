"""Memory, traffic and time of a training step, computed from the shapes of a run."""

from llada_jax.cluster import sharding
from llada_jax.cluster.hardware import Slice
from llada_jax.models.attention import choose
from llada_jax.models.flops import flops_per_token
from llada_jax.models.transformer import num_matmul_parameters, num_parameters
from llada_jax.planning import absent_devices
from llada_jax.training.step import Recipe, make_recipe

# What fraction of the peak the executed FLOPs reach, recomputation included. Published dense models
# of 7B to 70B reach 40 to 70% of the peak in model FLOPs, with up to a third recomputed on top
# (MaxText's README and tpu-recipes).
EFFICIENCY = {"slow": 0.45, "fast": 0.75}


def recipe_of_shapes(config, mesh, vocab_size: int) -> Recipe:
    """Returns the recipe of a config for a mesh of absent devices, to read shapes from.

    It is put together with the reference attention, because cuDNN cannot even be traced where it is
    not installed; `attention` names what the run would use.
    """
    traced = config.copy_and_resolve_references()
    traced.model.attention = "xla"
    recipe = make_recipe(traced, absent_devices.mask_token_stand_in(vocab_size), mesh)
    attention = choose(
        config.model.attention,
        platform=sharding.platform(mesh),
        packed=not config.data.attend_across_documents,
        sequence_length=config.data.sequence_length,
        head_dim=recipe.architecture.head_dim,
        dtype=recipe.dtype,
    )
    return recipe._replace(attention=attention)


def arithmetic(
    config, recipe: Recipe, shape: dict[str, int], machines: Slice, num_slices: int
) -> dict:
    """Returns `plan` for a mesh of any shape; `recipe` may have been made for another one.

    Args:
        shape: {mesh axis: size}.
    """
    a, chip = recipe.architecture, machines.accelerator
    B, T, A = (
        config.data.batch_size,
        config.data.sequence_length,
        config.optimizer.gradient_accumulation,
    )
    num_devices = machines.num_devices * num_slices
    is_causal = recipe.objective.mask.causal
    num_matmul = num_matmul_parameters(a)
    flops = flops_per_token(num_matmul, a.num_layers, a.num_heads * a.head_dim, T, causal=is_causal)
    rows = B // A // (shape["data"] * shape["fsdp"] * shape["expert"])
    tokens = rows * T // shape["sequence"]  # of one device in one microbatch
    memory = memory_of(config, recipe, shape, rows=rows, tokens=tokens)
    traffic = traffic_of(config, recipe, shape, tokens=tokens, num_slices=num_slices)
    step = B * T * flops / num_devices * (1 + recomputed(config, recipe) / flops)
    seconds = step_seconds(step, traffic, machines, num_slices)
    num_tokens = recipe.num_steps * B * T
    return {
        "topology": machines.name,
        "slices": num_slices,
        "chips": machines.num_chips * num_slices,
        "hosts": machines.num_hosts * num_slices,
        "devices": num_devices,
        "accelerator": chip.name,
        "peak_flops": chip.peak_flops / chip.devices_per_chip,
        "usable_bytes": chip.usable_hbm_bytes // chip.devices_per_chip,
        "mesh": shape,
        "remat": config.model.remat,
        "attention": recipe.attention,
        "dtype": recipe.dtype.name,
        "parameters": num_parameters(a),
        "matmul_parameters": num_matmul,
        "vocab_size": a.vocab_size,
        "layers": a.num_layers,
        "d_attention": a.num_heads * a.head_dim,
        "sequence_length": T,
        "causal": is_causal,
        "flops_per_token": flops,
        "batch_size": B,
        "microbatches": A,
        "rows_per_device": rows,
        "tokens_per_device": tokens,
        "tokens_per_step": B * T,
        "num_steps": recipe.num_steps,
        "num_tokens": num_tokens,
        "executed_flops": step,
        "memory": memory,
        "traffic": traffic,
        "network_counted": is_network_known(machines),
        "intensity": intensity_of(
            machines, shape, num_slices, tokens=tokens, tokens_per_slice=B * T // A // num_slices
        ),
        "seconds_per_step": seconds,
        "mfu": {
            k: B * T * flops / num_devices / (v * chip.peak_flops / chip.devices_per_chip)
            for k, v in seconds.items()
        },
        "days": {k: v * recipe.num_steps / 86400 for k, v in seconds.items()},
        "chip_hours": {
            k: v * recipe.num_steps / 3600 * machines.num_chips * num_slices
            for k, v in seconds.items()
        },
        "replicated": sharding.replicated_by_accident(
            recipe.abstract.params, recipe.batch_sharding.mesh
        ),
    }


def memory_of(config, recipe: Recipe, shape: dict[str, int], *, rows: int, tokens: int) -> dict:
    """Returns bytes of one device: state (exact), and estimates of what a step adds.

    Counted in elements a token, with D, N, K, H, F as in llada_jax and heads and F divided by the
    tensor axis:
        saved by the forward pass for each layer: D (full: its input), + N H (attention: the output
        of attention),
            + D + (N + 2 K) H + 2 F + D (dots: the outputs of all products), + 2 D + (2 N + K) H + 2
            F (none: norms, rotary, activations; scores too where attention is the reference);
        at work in the backward pass of one layer: 4 D + (3 N + 2 K) H + 4 F, and its weights twice,
        gathered; logits of one piece of the vocabulary and their gradient, float32, and the head's
        input and its gradient.
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
    gradients = absent_devices.sharded_bytes(
        recipe.abstract.params, shape
    )  # float32, as the parameters
    layer_weights = (num_matmul_parameters(a) - D * a.vocab_size) / L / t * itemsize
    num_pieces = -(-config.data.sequence_length // config.model.nll_chunk)
    layer = tokens * itemsize * (4 * D + 3 * N + 2 * K + 4 * F + 3 * scores) + 2 * layer_weights
    head = tokens * (2 * 4 * a.vocab_size / t / num_pieces + 2 * 4 * D)
    sizes = {
        "state": absent_devices.sharded_bytes(recipe.abstract, shape),
        "gradients": gradients * (2 if config.optimizer.gradient_accumulation > 1 else 1),
        "saved_activations": int(tokens * L * saved * itemsize),
        "working": int(max(layer, head)),
    }
    return {**sizes, "peak": sum(sizes.values())}


def recomputed(config, recipe: Recipe) -> float:
    """Returns the FLOPs a token that the backward pass repeats: by remat policy, and the head when
    it is cut in pieces.
    """
    a, T = recipe.architecture, config.data.sequence_length
    head = a.d_model * a.vocab_size
    projections = 2 * (num_matmul_parameters(a) - head)
    scores = 4 * a.num_layers * a.num_heads * a.head_dim * T
    layers = {"none": 0, "dots": scores, "attention": projections, "full": projections + scores}[
        config.model.remat
    ]
    return layers + (2 * head if config.data.sequence_length > config.model.nll_chunk else 0)


def traffic_of(
    config, recipe: Recipe, shape: dict[str, int], *, tokens: int, num_slices: int
) -> dict:
    """Returns bytes of whole arrays that one device takes part in exchanging in one step, by
    purpose.

    gather: every weight matrix twice a microbatch (forward, backward), in the compute dtype, over
    fsdp. scatter: its gradient once a microbatch, over fsdp. data: the gradient's shard, over data
    within a slice; dcn: between slices. tensor: activations, twice forward, twice backward and once
    again when a layer is recomputed. sequence: keys and values, forward, backward and recomputed.
    """
    a, A, itemsize = (
        recipe.architecture,
        config.optimizer.gradient_accumulation,
        recipe.dtype.itemsize,
    )
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
        "tensor": int(A * activations * a.d_model * (5 if again else 4))
        if shape["tensor"] > 1
        else 0,
        "sequence": int(A * activations * sequence * keys_and_values * (3 if again else 2))
        if sequence > 1
        else 0,
    }


def bandwidth(machines: Slice) -> dict[str, float]:
    """Returns bytes a second that a device sends over ICI or NVLink: on all its links, and on one
    axis of the torus.
    """
    chip = machines.accelerator
    whole = chip.link_bandwidth / 2 / chip.devices_per_chip  # the table counts both directions
    return {"fast": whole, "slow": whole / len(machines.topology)}


def is_network_known(machines: Slice) -> bool:
    """Whether the table has the bandwidth of all that connects the devices: not between hosts of
    GPUs.
    """
    return machines.accelerator.platform == "tpu" or machines.num_hosts == 1


def step_seconds(
    executed_flops: float, traffic: dict, machines: Slice, num_slices: int
) -> dict[str, float]:
    """Returns the time of a step, fast and slow.

    fast: EFFICIENCY["fast"] of the peak, all communication hidden behind it unless that takes
    longer, on all links, a gather or scatter of V bytes taking V / bandwidth, an all-reduce twice
    that. slow: EFFICIENCY["slow"], nothing hidden, on the links of one axis, and gathers and
    scatters done as all-reduces, as libtpu does over whole slices. Between the hosts of GPUs,
    communication is not counted: their network is not known.
    """
    chip = machines.accelerator
    links, seconds = bandwidth(machines), {}
    for case, efficiency in EFFICIENCY.items():
        once = traffic["gather"] + traffic["scatter"] + traffic["sequence"]
        twice = traffic["data"] + traffic["tensor"]
        exchanged = (once * (2 if case == "slow" else 1) + 2 * twice) / links[case]
        if num_slices > 1:
            exchanged += (
                2
                * (num_slices - 1)
                / num_slices
                * traffic["dcn"]
                / (chip.dcn_bandwidth / chip.devices_per_chip)
            )
        if not is_network_known(machines):
            exchanged = 0.0
        computed = executed_flops / (efficiency * chip.peak_flops / chip.devices_per_chip)
        seconds[case] = max(computed, exchanged) if case == "fast" else computed + exchanged
    return seconds


def intensity_of(
    machines: Slice, shape: dict[str, int], num_slices: int, *, tokens: int, tokens_per_slice: int
) -> dict:
    """Returns tokens that there are and that must be, for computing to take longer than gathering
    weights.

    A layer of P parameters takes 6 P tokens FLOPs and moves 3 * 2 P bytes over fsdp (both
    bfloat16), so that it is bound by computing above peak / bandwidth tokens a device (the "How to
    Scale Your Model" book, chapter on training). With several slices, 2 * 2 P bytes of gradient go
    over the data centre network against 6 P tokens of FLOPs on a slice.
    """
    chip, links = machines.accelerator, bandwidth(machines)
    peak = chip.peak_flops / chip.devices_per_chip
    limits = {
        "tokens_per_device": tokens,
        "needed_on_all_links": peak / links["fast"] / shape["tensor"],
    }
    limits["needed_on_one_axis"] = peak / links["slow"] / shape["tensor"]
    if num_slices > 1:
        limits["tokens_per_slice"] = tokens_per_slice
        limits["needed_between_slices"] = chip.peak_flops / chip.dcn_bandwidth
    return limits
