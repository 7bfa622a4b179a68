"""What a step costs by arithmetic: operations, caches and activations, from shapes alone.

Operations are multiplications and additions, two a weight and token (Kaplan et al. 2020, section
2.1, counts the same). Attention counts what a causal mask and a window leave: plain attention
computes whole squares, up to twice as much.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig


class Rows(NamedTuple):
  """Sequences that a model reads: how many, tokens of the prompt, and of the response.

  So many as `shared` says are read behind one prompt.
  """

  number: int
  prompt: int
  response: int
  shared: int = 1

  @property
  def length(self) -> int:
    """Tokens of a sequence that are read: nothing is predicted from the last one."""
    return self.prompt + self.response - 1

  @property
  def prompts(self) -> int:
    """How many prompts are read."""
    return max(self.number // self.shared, 1)

  @property
  def tokens(self) -> int:
    """Tokens that are read of all sequences."""
    return self.prompts * self.prompt + self.number * (self.response - 1)


def block_weights(model: ModelConfig) -> int:
  """Entries of the matrices of one layer."""
  heads = (2 * model.heads + 2 * model.num_kv_heads) * model.size_per_head
  return model.width * (heads + (3 if model.gated_mlp else 2) * model.mlp_width)


def _seen(model: ModelConfig, rows: Rows) -> int:
  """Pairs of a token and one that it sees, summed over layers and sequences."""

  def pairs(length: int, window: int | None) -> int:
    width = length if window is None else min(window, length)
    return width * (width + 1) // 2 + (length - width) * width

  def layer(window: int | None) -> int:
    of_prompt, of_whole = (pairs(length, window) for length in (rows.prompt, rows.length))
    return rows.prompts * of_prompt + rows.number * (of_whole - of_prompt)

  return sum(layer(model.window if local else None) for local in model.is_local())


def forward_flops(model: ModelConfig, rows: Rows, *, scored: bool = True) -> float:
  """Operations of reading sequences; `scored`: and the logits of their responses."""
  products = 2.0 * rows.tokens * model.layers * block_weights(model)
  attention = 4.0 * model.heads * model.size_per_head * _seen(model, rows)
  readout = 2.0 * rows.number * rows.response * model.width * model.padded_vocab_size
  return products + attention + (readout if scored else 0.0)


def training_flops(
  model: ModelConfig, rows: Rows, adapter: AdapterConfig | None = None, *, scored: bool = True
) -> float:
  """Operations of one gradient: the forward pass, the backward pass, and what that repeats.

  A backward pass is two forward passes: for the gradients of activations, and of weights, which
  LoRA hardly has. It ends below the lowest layer that is trained.
  """
  forward, blocks = (forward_flops(model, rows, scored=s) for s in (scored, False))
  readout = forward - blocks
  method = 'none' if adapter is None else adapter.method
  through = blocks
  if adapter is not None and method == 'last_layers':
    through *= adapter.last_layers / model.layers
  repeated = through if model.remat_policy == 'full' else 0.0
  if model.ids_at_once is not None or model.remat_policy != 'none':
    repeated += readout
  if method == 'none':
    return forward + 2.0 * (through + readout) + repeated
  return forward + (1.0 if method == 'lora' else 2.0) * through + readout + repeated


def generation_flops(model: ModelConfig, rows: Rows) -> float:
  """Operations of sampling responses of full length, with a cache: those of reading them once."""
  return forward_flops(model, rows)


def cache_bytes(model: ModelConfig, rows: Rows, mesh: dict[str, int]) -> int:
  """The key-value cache of sampling, on one device."""
  devices = mesh['data'] * mesh['fsdp']
  count = math.ceil(rows.number / devices) if rows.number % devices == 0 else rows.number
  tensor = mesh['tensor']
  heads = model.num_kv_heads // (tensor if model.num_kv_heads % tensor == 0 else 1)
  entries = 2 * model.layers * count * heads * rows.length * model.size_per_head
  return entries * jnp.dtype(model.compute_dtype).itemsize


def sampling_cache_bytes(
  model: ModelConfig, rows: Rows, copies: int, slots: int, mesh: dict[str, int]
) -> int:
  """The caches of sampling, on one device: that of the loop, and that of prompts if it has its own.

  Args:
    model: the architecture.
    rows: all responses.
    copies: how many answer one prompt.
    slots: how many are sampled at a time; 0: all.
    mesh: sizes of its axes.
  """
  slots = min(slots or rows.number, rows.number)
  loop = cache_bytes(model, rows._replace(number=slots), mesh)
  if slots == rows.number and copies == 1:
    return loop
  return loop + cache_bytes(model, Rows(rows.number // copies, rows.prompt, 0), mesh)


def sampling_weights(model: ModelConfig, mesh: dict[str, int], *, gathered: bool) -> float:
  """The copy of a device's weights in the compute type that sampling makes for its loop."""
  weights = model.layers * block_weights(model)
  weights += (1 if model.tied_embeddings else 2) * model.width * model.padded_vocab_size
  parts = mesh['tensor'] * (1 if gathered else mesh['fsdp'])
  return weights / parts * jnp.dtype(model.compute_dtype).itemsize


def decoding_bytes(model: ModelConfig, rows: Rows, mesh: dict[str, int]) -> float:
  """What a device reads of its memory to sample: all its weights a token, and the filled cache."""
  weights = model.layers * block_weights(model) + model.width * model.padded_vocab_size
  read = weights / mesh['tensor'] * jnp.dtype(model.compute_dtype).itemsize
  filled = (rows.prompt + rows.response / 2) / rows.length
  return rows.response * (read + filled * cache_bytes(model, rows, mesh))


class Activations(NamedTuple):
  """An estimate of what one device holds between forward and backward pass, in bytes.

  Attributes:
    saved: kept of every layer, by the remat policy.
    working: one layer while its backward pass runs, with its weights gathered over fsdp.
    readout: logits and what comes of them.
  """

  saved: float
  working: float
  readout: float

  @property
  def total(self) -> float:
    """All of it."""
    return self.saved + self.working + self.readout


def activation_bytes(
  model: ModelConfig, rows: Rows, mesh: dict[str, int], *, plain_attention: bool
) -> Activations:
  """What an accelerator's compiler would hold for a gradient.

  Args:
    model: the decoder.
    rows: the sequences that one device reads at a time.
    mesh: sizes of the axes.
    plain_attention: scores are held, as by 'xla'; False: a kernel keeps them to itself.
  """
  size, tensor = jnp.dtype(model.compute_dtype).itemsize, mesh['tensor']
  tokens, width = rows.tokens, model.width
  heads = (model.heads + 2 * model.num_kv_heads) * model.size_per_head / tensor
  hidden = (2 if model.gated_mlp else 1) * model.mlp_width / tensor
  products = tokens * (3 * width + heads + hidden) * size
  # Norms and the gated product.
  others = tokens * (2 * width + 2 * model.mlp_width / tensor) * size
  layer = products + others + _score_bytes(model, rows, tensor, plain_attention)
  saved = {'full': tokens * width * size, 'dots': products, 'none': layer}[model.remat_policy]
  return Activations(
    saved * model.layers,
    (0.0 if model.remat_policy == 'none' else layer) + _gathered_bytes(model, tensor),
    _readout_bytes(model, rows, tensor),
  )


def reading_bytes(
  model: ModelConfig,
  rows: Rows,
  mesh: dict[str, int],
  *,
  plain_attention: bool,
  scored: bool = True,
) -> float:
  """What an accelerator's compiler would hold to read sequences without a gradient.

  One layer at a time, of its two halves the larger, and what `activation_bytes` has of weights and
  logits. Arguments are those of `activation_bytes`, and of `forward_flops`.
  """
  size, tensor = jnp.dtype(model.compute_dtype).itemsize, mesh['tensor']
  tokens = rows.tokens
  heads = (model.heads + 2 * model.num_kv_heads) * model.size_per_head / tensor
  attention = tokens * heads * size + _score_bytes(model, rows, tensor, plain_attention)
  mlp = tokens * (2 if model.gated_mlp else 1) * model.mlp_width / tensor * size
  stream = 3 * tokens * model.width * size  # what comes in, its norm, what goes out
  readout = _readout_bytes(model, rows, tensor) if scored else 0.0
  return stream + max(attention, mlp) + _gathered_bytes(model, tensor) + readout


def _score_bytes(model: ModelConfig, rows: Rows, tensor: int, plain_attention: bool) -> float:
  """Attention scores, twice in float32 and once as weights; kernels keep them to themselves."""
  size = jnp.dtype(model.compute_dtype).itemsize
  pairs = rows.number * rows.length**2
  if rows.shared > 1:
    pairs = rows.prompts * rows.prompt**2 + rows.number * (rows.response - 1) * rows.length
  held = pairs * model.heads / tensor * (8 + size)
  return held if plain_attention else 0.0


def _gathered_bytes(model: ModelConfig, tensor: int) -> float:
  """The weights of a layer, gathered over fsdp, and of the next one."""
  return 2.0 * block_weights(model) / tensor * jnp.dtype(model.compute_dtype).itemsize


def _readout_bytes(model: ModelConfig, rows: Rows, tensor: int) -> float:
  """Logits in float32 and what comes of them, of a chunk of the vocabulary where it is cut."""
  ids = model.padded_vocab_size / tensor
  if model.ids_at_once is not None:
    ids = min(ids, model.ids_at_once)
  return 3.0 * rows.number * rows.response * ids * 4


def sequences_in(batch: Any, prompt: int) -> Rows:
  """How many sequences a batch of shapes has."""
  sequences = getattr(batch, 'sequences', batch)
  *rows, response = sequences.response.shape
  copies = math.prod(rows) // math.prod(sequences.prompt.shape[:-1])
  return Rows(math.prod(rows), prompt, response, copies)
