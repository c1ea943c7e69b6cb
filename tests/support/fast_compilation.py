"""XLA_FLAGS with which tests compile in a third of the time, and options that run faster."""

import importlib.metadata

from packaging.version import Version

# XLA's own passes all run, LLVM's do not, in one module per program instead of 32, and fused
# operations are not lowered through MLIR, to which jax 0.12 has no alternative any more and does
# not know the flag.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if Version(importlib.metadata.version("jaxlib")) < Version("0.11"):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"

# LLVM's passes, for `jax.jit` in the few tests that compute for longer than they compile.
WITH_LLVM_PASSES = {"xla_backend_optimization_level": 3}
