"""The reader of collectives: on programs written by hand, and where the traffic is known."""

import json
import os
import subprocess
import sys

import pytest

from llada_jax.planning.collectives import _axes, _groups, collectives

# HLO has one instruction per line.
# ruff: noqa: E501
WRITTEN_BY_HAND = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%insert (param_0: bf16[64,8], param_1: bf16[8,8], param_2: s32[]) -> bf16[64,8] {
  %param_0 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %update = bf16[64,8]{1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0, %param_1, %param_2, %zero)
  ROOT %bits = bf16[64,8]{1,0:T(8,128)(2,1)} bitcast(%update)
}

%take (param_3: bf16[64,8], param_4: s32[]) -> f32[8,8] {
  %param_3 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %param_4 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %slice = bf16[8,8]{1,0:T(8,128)(2,1)} dynamic-slice(%param_3, %param_4, %zero.1), dynamic_slice_sizes={8,8}
  ROOT %wide = f32[8,8]{1,0:T(8,128)} convert(%slice)
}

%body (state: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %state = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %shard = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %zeros = bf16[64,8]{1,0:T(8,128)(2,1)} broadcast(%i), dimensions={}
  %placed = bf16[64,8]{1,0:T(8,128)(2,1)} fusion(%zeros, %shard, %i), kind=kLoop, calls=%insert
  %gathered = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%placed), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, use_global_device_ids=true, to_apply=%add
  %splash_mha_fwd.3 = bf16[64,8]{1,0:T(8,128)(2,1)} custom-call(%gathered), custom_call_target="tpu_custom_call"
  %reduced = (bf16[64,8]{1,0:T(8,128)(2,1)}, /*index=1*/f32[10]{0:T(128)}) all-reduce(%splash_mha_fwd.3, %i), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/feed_forward/dot" stack_frame_id=1}
  %gradient = bf16[64,8]{1,0:T(8,128)(2,1)} get-tuple-element(%reduced), index=0
  %sums = f32[10]{0:T(128)} get-tuple-element(%reduced), index=1
  %kept = f32[8,8]{1,0:T(8,128)} fusion(%gradient, %i), kind=kLoop, calls=%take
  %next = bf16[8,8]{1,0:T(8,128)(2,1)} convert(%kept)
  ROOT %out = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) tuple(%i, %next)
}

%condition (state.1: (s32[], bf16[8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  %state.1 = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: bf16[8,8], q: f32[16,8]) -> (bf16[8,8], f32[2,8]) {
  %p = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[16,8]{1,0:T(8,128)} parameter(1)
  %start = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) tuple(%start, %p)
  %loop = (s32[]{:T(128)}, bf16[8,8]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  %scattered = f32[2,8]{1,0:T(8,128)} reduce-scatter(%q), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %started = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%scattered), channel_id=4, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%started)
  %alone = f32[16,8]{1,0} all-reduce(%done), channel_id=5, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %last = bf16[8,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  ROOT %result = (bf16[8,8]{1,0:T(8,128)(2,1)}, f32[2,8]{1,0}) tuple(%last, %scattered)
}
"""


def test_collectives_count_their_bytes_their_loops_and_what_they_achieve():
    found = {(c.kind, c.num_bytes, c.times, c.group_size) for c in collectives(WRITTEN_BY_HAND)}
    assert found == {
        ("all-gather (as all-reduce)", 64 * 8 * 2, 32, 8),
        ("reduce-scatter (as all-reduce)", 64 * 8 * 2, 32, 4),
        ("all-reduce", 10 * 4, 32, 4),
        ("reduce-scatter", 16 * 8 * 4, 1, 8),
        ("all-gather", 16 * 8 * 4, 1, 2),
    }
    (gradient,) = (
        c for c in collectives(WRITTEN_BY_HAND) if c.kind == "reduce-scatter (as all-reduce)"
    )
    assert (gradient.dtype, gradient.where, gradient.total_bytes) == (
        "bf16",
        "jit(step)/feed_forward/dot",
        32 * 1024,
    )


def test_groups_that_span_slices_are_distinguished_from_those_within_one():
    spans = {c.kind: c.spans_slices for c in collectives(WRITTEN_BY_HAND, devices_per_slice=4)}
    assert spans == {
        "all-gather (as all-reduce)": True,
        "reduce-scatter (as all-reduce)": False,
        "all-reduce": False,
        "reduce-scatter": True,
        "all-gather": True,
    }


PEELED_AND_OVERLAPPED = """HloModule jit_step

%first_half (a: bf16[8,8]) -> bf16[64,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[64,8]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%second_half (b: bf16[8,8]) -> bf16[64,8] {
  %b = bf16[8,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,8]{1,0} all-gather(%b), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (state: (bf16[8,8], s32[])) -> (bf16[8,8], s32[]) {
  %state = (bf16[8,8]{1,0}, s32[]) parameter(0)
  %shard = bf16[8,8]{1,0} get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %begun = bf16[64,8]{1,0} fusion(%shard), kind=kCustom, calls=%first_half
  %ended = bf16[64,8]{1,0} fusion(%shard), kind=kCustom, calls=%second_half
  %token = token[] after-all()
  %sent = (bf16[4,8,128]{2,1,0}, u32[], token[]) send(%shard, %token), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.5_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = (bf16[8,8]{1,0}, s32[]) tuple(%shard, %i)
}

%condition (state.1: (bf16[8,8], s32[])) -> pred[] {
  %limit = s32[] constant(32)
  %state.1 = (bf16[8,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=1
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: bf16[8,8]) -> (bf16[8,8], s32[]) {
  %p = bf16[8,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %init = (bf16[8,8]{1,0}, s32[]) tuple(%p, %one)
  ROOT %loop = (bf16[8,8]{1,0}, s32[]) while(%init), condition=%condition, body=%body
}
"""


def test_a_peeled_loop_an_overlapped_gather_and_a_send_between_slices_count_once_per_iteration():
    found = {
        (c.kind, c.num_bytes, c.times, c.spans_slices) for c in collectives(PEELED_AND_OVERLAPPED)
    }
    assert found == {
        ("all-gather", 64 * 8 * 2, 31, False),
        ("all-reduce", 4 * 8 * 128 * 2, 31, True),
    }


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4, 1, 5], [2, 6, 3, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", []),
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    assert _groups(f"channel_id=1, {written}, use_global_device_ids=true") == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], "data+fsdp"),
        # who sends to whom: along fsdp in one pair and along data in another
        ([[0, 2], [2, 4]], "data+fsdp"),
        ([], "data+fsdp+tensor"),
    ],
)
def test_a_group_is_named_by_the_mesh_axes_along_which_its_devices_lie(groups, axes):
    shape = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2, "expert": 1}
    assert _axes(groups, shape) == axes
    assert _axes(groups, {}) == ""


ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gemm_fusion_dot_computation (x: bf16[64,64], y: bf16[64,64]) -> bf16[64,64] {
  %x = bf16[64,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  ROOT %dot = bf16[64,64]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%wrapped_exchange (z: bf16[64,64]) -> bf16[64,64] {
  %z = bf16[64,64]{1,0} parameter(0)
  ROOT %exchanged = bf16[64,64]{1,0} all-to-all(%z), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}

%double (v: bf16[64,64]) -> bf16[64,64] {
  %v = bf16[64,64]{1,0} parameter(0)
  ROOT %twice = bf16[64,64]{1,0} add(%v, %v)
}

ENTRY %main (p: bf16[64,64], q: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  %q = bf16[8,64]{1,0} parameter(1)
  %hidden = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%q), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %exchange = ((bf16[64,64]{1,0}), bf16[64,64]{1,0}, s32[]) async-start(%p), calls=%wrapped_exchange
  %product = bf16[64,64]{1,0} fusion(%p, %p), kind=kCustom, calls=%gemm_fusion_dot_computation
  %gathered = bf16[64,64]{1,0} all-gather-done(%hidden)
  %bare = ((f32[64,64]{1,0}), f32[8,64]{1,0}) reduce-scatter-start(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %doubled = bf16[64,64]{1,0} fusion(%gathered), kind=kLoop, calls=%double
  %scattered = f32[8,64]{1,0} reduce-scatter-done(%bare)
  %other = bf16[64,64]{1,0} async-done(%exchange)
  %waited = f32[64]{0} all-reduce(%scattered), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  %attention = (bf16[64,64]{1,0}, u8[0]{0}) custom-call(%doubled), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %result = bf16[64,64]{1,0} fusion(%product, %gathered), kind=kCustom, calls=%gemm_fusion_dot_computation
}
"""


def test_a_collective_is_overlapped_where_a_product_stands_between_its_start_and_its_done():
    found = {
        c.kind: (c.is_asynchronous, c.is_overlapped, c.num_bytes) for c in collectives(ASYNCHRONOUS)
    }
    assert found == {
        "all-gather": (True, True, 64 * 64 * 2),
        "all-to-all": (True, True, 64 * 64 * 2),
        # an addition is not long enough to hide behind
        "reduce-scatter": (True, False, 64 * 64 * 4),
        "all-reduce": (False, False, 64 * 4),
    }


def test_of_the_collectives_of_one_channel_each_counts_that_a_shard_map_has_asked_for():
    """The others are parts of one, among which the compiler has spread it."""
    parts = ASYNCHRONOUS.replace("channel_id=3", "channel_id=2")
    name = 'metadata={op_name="jit(step)/shard_map/all_to_all"}'
    asked_for = ASYNCHRONOUS.replace("channel_id=3", f"channel_id=2, {name}")
    assert [len(collectives(text)) for text in (ASYNCHRONOUS, asked_for, parts)] == [4, 4, 3]


def test_a_collective_hides_behind_a_kernel_too():
    kernel_first = ASYNCHRONOUS.replace("%scattered =", "%later =").replace(
        "  %waited =",
        '  %k = (bf16[64,64]{1,0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"\n'
        "  %scattered = f32[8,64]{1,0} reduce-scatter-done(%bare)\n  %waited =",
    )
    kernel_first = kernel_first.replace(
        "  %later = f32[8,64]{1,0} reduce-scatter-done(%bare)\n", ""
    )
    (scatter,) = (c for c in collectives(kernel_first) if c.kind == "reduce-scatter")
    assert scatter.is_overlapped


def test_a_gather_that_is_spread_over_fusions_is_asynchronous():
    (gather,) = (c for c in collectives(PEELED_AND_OVERLAPPED) if c.kind == "all-gather")
    # none of these two holds a product
    assert (gather.is_asynchronous, gather.is_overlapped) == (True, False)


# Shortened from what libtpu 0.0.42 makes of one layer on v5p-128 with the preset v5p.
ON_SPARSE_CORES = """HloModule jit_step, is_scheduled=true

%called_computation.1 (param_0.174: bf16[1,32,8192], param_1.143: token[]) -> bf16[1,2048,8192] {
  %param_1.143 = token[] parameter(1)
  %param_0.174 = bf16[1,32,8192]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.21 = bf16[1,2048,8192]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.174), channel_id=9, replica_groups=mesh['axis_0'=64,'axis_1'=1] {'axis_0'}, dimensions={1}, use_global_device_ids=true, backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}
}, execution_thread="sparsecore"

%add.clone.clone (x.6: bf16[], y.4: bf16[]) -> bf16[] {
  %x.6 = bf16[]{:T(256)S(7)} parameter(0)
  %y.4 = bf16[]{:T(256)S(7)} parameter(1)
  ROOT %add.69 = bf16[]{:T(256)S(7)} add(%x.6, %y.4)
}, execution_thread="sparsecore"

%called_computation.4 (param_0.180: bf16[2048,8192], param_1.151: token[]) -> bf16[32,8192] {
  %param_1.151 = token[] parameter(1)
  %param_0.180 = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %reduce-scatter.10 = bf16[32,8192]{1,0:T(8,128)(2,1)} reduce-scatter(%param_0.180), channel_id=6, replica_groups=mesh['axis_0'=64,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, dimensions={0}, to_apply=%add.clone.clone, backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}
}, execution_thread="sparsecore"

%fused_computation.2 (param_0.1: bf16[2048,8192], param_1.2: bf16[4096,2048]) -> bf16[4096,8192] {
  %param_0.1 = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.3 = bf16[4096,8192]{1,0:T(8,128)(2,1)} convolution(%param_1.2, %param_0.1), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[1,32,8192], q: bf16[2048,8192], r: bf16[4096,2048]) -> bf16[32,8192] {
  %p = bf16[1,32,8192]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[2048,8192]{1,0:T(8,128)(2,1)} parameter(1)
  %r = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %prepare_start = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %prepare_done = token[] custom-call(%prepare_start), custom_call_target="PrepareAsyncCallDone"
  %all-gather.22.cloned.1.call-start = ((bf16[1,32,8192]{2,1,0:T(8,128)(2,1)}, token[]), bf16[1,2048,8192]{2,1,0:T(8,128)(2,1)}) call-start(%p, %prepare_done), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %all-gather.22.cloned.1.call-done = bf16[1,2048,8192]{2,1,0:T(8,128)(2,1)} call-done(%all-gather.22.cloned.1.call-start)
  %reduce-scatter.11.cloned.1.call-start = ((bf16[2048,8192]{1,0:T(8,128)(2,1)}, token[]), bf16[32,8192]{1,0:T(8,128)(2,1)}) call-start(%q, %prepare_done), async_execution_thread="sparsecore", to_apply=%called_computation.4
  %fusion.81 = bf16[4096,8192]{1,0:T(8,128)(2,1)} fusion(%all-gather.22.cloned.1.call-done, %r), kind=kOutput, calls=%fused_computation.2
  ROOT %reduce-scatter.11.cloned.1.call-done = bf16[32,8192]{1,0:T(8,128)(2,1)} call-done(%reduce-scatter.11.cloned.1.call-start)
}
"""


def test_collectives_on_sparse_cores_are_counted_and_are_asynchronous():
    found = {
        c.kind: (c.is_asynchronous, c.is_overlapped, c.total_bytes, c.group_size)
        for c in collectives(ON_SPARSE_CORES)
    }
    assert found == {
        "all-gather": (True, False, 2048 * 8192 * 2, 64),
        "reduce-scatter": (True, True, 2048 * 8192 * 2, 64),
    }


COMPILE = """
import json
import jax, jax.numpy as jnp
from llada_jax.cluster import sharding
from llada_jax.models.model import make_model, parameter_shardings
from llada_jax.models.transformer import Architecture
from llada_jax.planning.collectives import collectives
a = Architecture(
    vocab_size=1150, num_layers=1, d_model=64, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64
)
results = []
for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh(sizes)
    for nll_chunk, capacity in ((64, None), (8, None), (64, lambda rows, length, ways: rows * 5)):
        model = make_model(a, nll_chunk=nll_chunk, capacity=capacity)
        shardings = parameter_shardings(model, mesh)
        shaped = lambda l, s: jax.ShapeDtypeStruct(l.shape, l.dtype, sharding=s)
        params = jax.tree.map(shaped, model.abstract, shardings)
        tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32, sharding=sharding.batch_sharding(mesh))
        loss = lambda p, t: model.nll_fn(p, t, t, t > 3, None, t).nll_BT.sum()
        with jax.set_mesh(mesh):
            jitted = jax.jit(jax.grad(loss), out_shardings=shardings)
            text = jitted.lower(params, tokens).compile().as_text()
        results.append([sizes, nll_chunk, [c._asdict() for c in collectives(text)]])
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_gradient_of_the_head_is_reduced_once_per_step_in_however_many_pieces():
    """Compiled by XLA for eight CPU devices: with the head in one piece, in eight, and in one that
    scores some positions first.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)

    def total(found, *kinds):
        return sum(c["num_bytes"] * c["times"] for c in found if c["kind"].startswith(kinds))

    for (sizes, _, whole), (_, nll_chunk, pieces), (*_, some) in zip(
        results[::3], results[1::3], results[2::3], strict=True
    ):
        kernel = 64 * 1150 * 4 // sizes.get("tensor", 1)
        assert nll_chunk == 8
        assert kernel < total(whole, "all-reduce", "reduce-scatter")
        extra = total(pieces, "all-reduce", "reduce-scatter") - total(
            whole, "all-reduce", "reduce-scatter"
        )
        # A reduction for each piece would add seven kernels.
        assert extra < 0.5 * kernel, sizes
        # The kernel once more, for the backward pass, over one axis after the other.
        again = 2 * 64 * 1150 * 4
        assert total(pieces, "all-gather") < total(whole, "all-gather") + again, sizes
        # No position leaves its device. What is new is one bit: whether some device has more.
        assert {c["kind"] for c in some} <= {c["kind"] for c in whole}
        assert abs(total(some, "") - total(whole, "")) < 100, sizes
