"""The reader of kernels and copies, on a program written by hand."""

from llada_jax.planning.compiled_program import Copies, copies_in_loops, kernels, layout_copies

# HLO has one instruction per line.
# ruff: noqa: E501
WRITTEN_BY_HAND = """HloModule jit_step, is_scheduled=true

%turn (a: f32[1024,512]) -> bf16[512,1024] {
  %a = f32[1024,512]{1,0} parameter(0)
  %turned = f32[512,1024]{1,0} transpose(%a), dimensions={1,0}
  ROOT %narrow = bf16[512,1024]{1,0} convert(%turned)
}

%scale (b: f32[1024,512]) -> f32[1024,512] {
  %b = f32[1024,512]{1,0} parameter(0)
  %copied = f32[1024,512]{0,1} copy(%b)
  ROOT %scaled = f32[1024,512]{0,1} multiply(%copied, %copied)
}

%body (state: (s32[], f32[1024,512])) -> (s32[], f32[1024,512]) {
  %state = (s32[], f32[1024,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[1024,512]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %fast = f32[1024,512]{1,0:T(8,128)S(1)} copy(%x)
  %other = f32[1024,512]{0,1:T(8,128)} copy(%fast)
  %small = f32[16]{0} copy(%i)
  %turns = bf16[512,1024]{1,0} fusion(%x), kind=kInput, calls=%turn
  %scales = f32[1024,512]{0,1} fusion(%x), kind=kLoop, calls=%scale
  %splash_mha_fwd.3 = f32[1024,512]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %fmha = f32[1024,512]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %matmul = f32[1024,512]{1,0} custom-call(%x), custom_call_target="__cublas$gemm"
  ROOT %out = (s32[], f32[1024,512]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], f32[1024,512])) -> pred[] {
  %limit = s32[] constant(3)
  %state.1 = (s32[], f32[1024,512]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[1024,512]) -> (s32[], f32[1024,512]) {
  %p = f32[1024,512]{1,0} parameter(0)
  %start = s32[] constant(0)
  %init = (s32[], f32[1024,512]{1,0}) tuple(%start, %p)
  ROOT %loop = (s32[], f32[1024,512]{1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_kernels_are_named_and_counted_once_per_iteration():
    assert kernels(WRITTEN_BY_HAND) == {"splash_mha_fwd": 3, "__cudnn$fmhaSoftmax": 3}


def test_a_loop_whose_first_iteration_was_taken_out_is_read_as_gpus_write_it():
    """The counter starts at a sum of constants, and a fusion compares it."""
    fused = """
%sum () -> s32[] {
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  ROOT %first = s32[] add(%zero, %one)
}

%is_less (n: s32[]) -> pred[] {
  %n = s32[] parameter(0)
  %limit = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%n, %limit), direction=LT
}

%condition ("""
    program = WRITTEN_BY_HAND
    for before, after in (
        ("\n%condition (", fused),
        ("  %limit = s32[] constant(3)\n  %state.1", "  %state.1"),
        ("compare(%i.1, %limit), direction=LT", "fusion(%i.1), kind=kLoop, calls=%is_less"),
        ("%start = s32[] constant(0)", "%sums = s32[] fusion(), kind=kLoop, calls=%sum"),
        ("%init =", "%start = s32[] copy(%sums)\n  %init ="),
    ):
        assert program.count(before) == 1
        program = program.replace(before, after)
    assert kernels(program) == {"splash_mha_fwd": 2, "__cudnn$fmhaSoftmax": 2}


def test_copies_to_another_layout_are_counted_and_moves_to_another_memory_are_not():
    """Two in each of three iterations: the copy that turns, and the fusion that ends in a transpose.

    Not the move into the memory S(1), the copy of 64 bytes, and a copy inside of a fusion that
    computes.
    """
    sizes = 1024 * 512 * 4 + 1024 * 512 * 2
    assert layout_copies(WRITTEN_BY_HAND) == Copies(times=6, total_bytes=3 * sizes)


def test_what_a_loop_copies_is_counted_with_parts_of_stacked_arrays():
    assert copies_in_loops(WRITTEN_BY_HAND) == Copies(6, 6 * 1024 * 512 * 4)
    sliced = """
%part (c: f32[4,1024,512], n: s32[]) -> f32[1,1024,512] {
  %c = f32[4,1024,512]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %cut = f32[1,1024,512]{2,1,0} dynamic-slice(%c, %n, %n, %n), dynamic_slice_sizes={1,1024,512}
}

%body (state"""
    stacked = WRITTEN_BY_HAND.replace("\n%body (state", sliced, 1).replace(
        "%small = ", "%layer = f32[1,1024,512]{2,1,0} fusion(%x, %i), calls=%part\n  %small = ", 1
    )
    assert copies_in_loops(stacked) == Copies(9, 9 * 1024 * 512 * 4)


def test_a_loop_that_ends_by_what_it_has_computed_is_counted_once():
    """The loop of a sampler goes on while anything is hidden, and at most so many steps."""
    until = WRITTEN_BY_HAND.replace(
        "ROOT %less = pred[] compare(%i.1, %limit), direction=LT",
        "%less = pred[] compare(%i.1, %limit), direction=LT\n  ROOT %both = pred[] and(%less, %less)",
    )
    assert kernels(until) == {"splash_mha_fwd": 1, "__cudnn$fmhaSoftmax": 1}
