"""Which attention a decoder computes by: `ModelConfig.attention`, the backend, and the mesh."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.ops import attention_kernels
from rlhf_jax.ops.attention import attention
from rlhf_jax.sharding.mesh import BATCH_AXES

Array = jax.Array


class Objection(NamedTuple):
  """Why an implementation cannot serve: what it expects, and what to do instead."""

  expected: str
  remedy: str


def objection(
  name: str, config: ModelConfig, backend: str, widest: int | None = None
) -> Objection | None:
  """What stands against an implementation by that name on a backend; None: nothing.

  `widest` is the widest head of cuDNN there; None: as on the GPU here.
  """
  other = "'auto' chooses what the backend has, 'xla' runs everywhere."
  if name == 'cudnn':
    size = config.size_per_head
    if backend != 'gpu':
      return Objection(f"'xla' or 'tokamax' on {backend!r}: cuDNN needs an NVIDIA GPU", other)
    if config.compute_dtype != 'bfloat16':
      return Objection("model.dtype 'bfloat16'", 'cuDNN has no float32 attention.')
    if config.attention_softcap is not None:
      return Objection("'tokamax' or 'xla': cuDNN has no soft-cap", other)
    widest = _widest_head() if widest is None else widest
    if size % 8 or size > widest:
      return Objection(f'a head width that 8 divides and at most {widest} here, not {size}', other)
  if name == 'tokamax' and importlib.util.find_spec('tokamax') is None:
    return Objection("tokamax to be installed: the extra 'kernels'", other)
  if name == 'splash':
    if backend != 'tpu':
      return Objection(f"'xla' or 'tokamax' on {backend!r}: splash attention needs a TPU", other)
    if config.scanned and len(set(config.is_local())) > 1:
      return Objection(
        'layers that all see as far, or model.scan_layers=False',
        'One compiled block has one window.',
      )
  return None


def _widest_head() -> int:
  """Of cuDNN on the GPU here: 256 from Hopper on. Of one that is not here the most is expected."""
  capability = getattr(jax.devices()[0], 'compute_capability', '')
  major = capability.partition('.')[0]
  return 128 if major.isdigit() and int(major) < 9 else 256


def resolve(config: ModelConfig, backend: str | None = None, widest: int | None = None) -> str:
  """The implementation that a config means on a backend (None: that of this process).

  `widest` is as in `objection`.

  'auto' takes cuDNN on GPUs and splash attention on TPUs where they can compute what the config
  asks for, and plain XLA elsewhere.

  Raises:
    ConfigError: what `config.attention` names cannot run here, or not compute this.
  """
  backend = jax.default_backend() if backend is None else backend
  if config.attention == 'auto':
    fit = {'gpu': ('cudnn',), 'tpu': ('splash',) if config.size_per_head % 64 == 0 else ()}
    names = fit.get(backend, ())
    fitting = (name for name in names if objection(name, config, backend, widest) is None)
    return next(fitting, 'xla')
  found = objection(config.attention, config, backend, widest)
  if found is not None:
    raise ConfigError('model.attention', config.attention, *found)
  return config.attention


def portable(config: ModelConfig) -> ModelConfig:
  """The same decoder here: plain attention where that of its own machine cannot run."""
  if objection(config.attention, config, jax.default_backend()) is None:
    return config
  return dataclasses.replace(config, attention='xla')


def attend(
  config: ModelConfig,
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array,
  real: Array,
  window: int | None,
) -> Array:
  """Attention of whole sequences, without a cache, by the implementation that the config means.

  Args:
    config: the architecture.
    query: `[B, H, T, D]`, of the last T of the S columns.
    key: `[B, K, S, D]`.
    value: `[B, K, S, D]`.
    mask: `[B, T, S]` bool, what each token sees.
    real: `[B, S]` bool, real tokens: of these and the window `mask` was made. Or int32, where a row
      has several texts: the number of each token's text, 0 at padding.
    window: how many tokens this layer sees; None: all.
  """
  name = resolve(config)
  scale, softcap = config.attention_scale, config.attention_softcap
  if name == 'xla':
    return attention(query, key, value, mask, scale=scale, softcap=softcap)
  kernel: Callable[..., Array]
  if name == 'cudnn':
    kernel = functools.partial(attention_kernels.cudnn, scale=scale)
  elif name == 'tokamax':
    kernel = functools.partial(attention_kernels.tokamax, scale=scale, softcap=softcap)
  else:
    kernel = functools.partial(
      attention_kernels.splash, window=window, scale=scale, softcap=softcap
    )
  return over_mesh(kernel, query, key, value, real if name == 'splash' else mask)


class Branches(NamedTuple):
  """What the responses see that share a prompt, each as a row of its own: `B K` rows.

  Attributes:
    mask: `[B K, R, P + R]` bool, of the prompt's columns and the response's own.
    real: `[B K, P + R]` bool, real tokens among these.
  """

  mask: Array
  real: Array


def attend_branches(
  config: ModelConfig,
  query: Array,
  key: Array,
  value: Array,
  *,
  mask: Array,
  real: Array,
  branches: Branches,
  window: int | None,
) -> Array:
  """Attention of rows in which several responses follow one prompt, and none sees another.

  The columns are those of the prompt and then of each response, `P + K R`. Keys and values of the
  prompt are made once; what is computed of them is what rows of one response would compute, less
  the prompts' own attention, which there is once.

  Args:
    config: the architecture.
    query: `[B, H, P + K R, D]`.
    key: `[B, KV, P + K R, D]`.
    value: likewise.
    mask: `[B, P, P]` bool, what the prompt's tokens see.
    real: `[B, P]` bool, the prompt's real tokens.
    branches: the same of the responses.
    window: how many tokens this layer sees; None: all.
  """
  rows, length = query.shape[0], mask.shape[-1]
  count, width = branches.mask.shape[0] // rows, branches.mask.shape[1]
  # Not by slices: their gradients are sums of padded arrays, of which XLA makes a program for CPUs
  # that crashes where the columns are many (jaxlib 0.10.2).
  parted = [jnp.split(x, [length], axis=2) for x in (query, key, value)]
  own, responses = zip(*parted, strict=True)
  of_prompts = attend(config, *own, mask=mask, real=real, window=window)
  if not width:
    return of_prompts

  def apart(x: Array) -> Array:
    """The responses' columns, `[B, K, heads, R, D]`."""
    return x.reshape(rows, x.shape[1], count, width, x.shape[-1]).swapaxes(1, 2)

  def after_prompt(prompt: Array, response: Array) -> Array:
    """Each response's columns behind those of the prompt, `[B K, heads, P + R, D]`."""
    each = apart(response)
    shape = (*each.shape[:3], *prompt.shape[2:])
    joined = jnp.concatenate([jnp.broadcast_to(prompt[:, None], shape), each], axis=3)
    return joined.reshape(-1, *joined.shape[2:])

  mixed = attend(
    config,
    apart(responses[0]).reshape(rows * count, query.shape[1], width, query.shape[-1]),
    after_prompt(own[1], responses[1]),
    after_prompt(own[2], responses[2]),
    mask=branches.mask,
    real=branches.real,
    window=window,
  )
  mixed = mixed.reshape(rows, count, *mixed.shape[1:]).swapaxes(1, 2)
  mixed = mixed.reshape(*of_prompts.shape[:2], count * width, -1)
  return jnp.concatenate([of_prompts, mixed], axis=2)


def over_mesh(
  kernel: Callable[..., Array], query: Array, key: Array, value: Array, seen: Array
) -> Array:
  """Runs a kernel on each device's rows and heads: the compiler cannot cut it.

  Rows or heads that the mesh does not divide are computed by every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
    return kernel(query, key, value, seen)
  rows = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
  by_rows = BATCH_AXES if query.shape[0] % rows == 0 else None
  tensor = mesh.shape['tensor']
  by_heads = 'tensor' if query.shape[1] % tensor == key.shape[1] % tensor == 0 else None
  spec = PartitionSpec(by_rows, by_heads)
  mapped = jax.shard_map(
    kernel,
    in_specs=(spec, spec, spec, PartitionSpec(by_rows)),
    out_specs=spec,
    check_vma=False,
  )
  return mapped(query, key, value, seen)
