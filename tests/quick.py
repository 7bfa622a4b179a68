"""`jit` for tests: programs so small that compiling them takes longer than running them."""

import functools

import jax

# Without optimisation a program compiles in about half the time.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
