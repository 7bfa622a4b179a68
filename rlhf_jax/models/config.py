"""The one configuration of the decoder: every switch of the architectures that it covers."""

import dataclasses
import math

from rlhf_jax.common.errors import ConfigError

NORMS = ('rmsnorm', 'layernorm')
NORM_PLACEMENTS = ('pre', 'post', 'sandwich')
POSITIONS = ('rotary', 'learned')
ROTARY_SCALINGS = ('none', 'linear', 'llama3')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh')
DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'dots', 'full')
ATTENTIONS = ('xla', 'cudnn', 'tokamax', 'splash', 'auto')


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
  """A decoder-only transformer; the defaults are a small Llama-like one, trained from scratch."""

  # Number of token ids; 0: as many as the tokenizer has (filled in when the stage is built).
  vocab_size: int = 0
  # The embedding tables are rounded up to a multiple of this, so that the mesh's tensor axis
  # divides them; the added rows are never read and never scored (Megatron-LM:
  # make-vocab-size-divisible-by).
  vocab_multiple: int = 1
  # Width of the residual stream, d_model of Vaswani et al. 2017.
  width: int = 64
  # Number of blocks.
  layers: int = 2
  # Query heads of each block.
  heads: int = 4
  # Key and value heads, a divisor of `heads` (grouped-query attention, Ainslie et al. 2023);
  # None: as many as `heads`.
  kv_heads: int | None = None
  # Width of one head; None: width / heads.
  head_dim: int | None = None
  # Hidden width of the MLP; 8/3 of the width is usual for a gated one (Shazeer 2020, GLU variants).
  mlp_width: int = 172
  # 'silu' (Llama), 'gelu' (exact, NeoX), 'gelu_tanh' (its approximation, GPT-2 and Gemma).
  activation: str = 'silu'
  # True: down(act(gate(x)) * up(x)) (Llama, Gemma); False: down(act(up(x))) (GPT-2, NeoX).
  gated_mlp: bool = True

  # 'rmsnorm' (Llama, Qwen, Gemma) or 'layernorm' (GPT-2, NeoX; it has a bias).
  norm: str = 'rmsnorm'
  # 'pre': x + f(norm(x)); 'post': norm(x + f(x)) (Vaswani et al. 2017), no final norm;
  # 'sandwich': x + norm(f(norm(x))) (Gemma 2).
  norm_placement: str = 'pre'
  # Added to the variance; 1e-6 is Llama's first and Gemma's, 1e-5 GPT-2's and Llama 2's.
  norm_epsilon: float = 1e-6
  # True: the weight is stored as w and multiplies as 1 + w (Gemma).
  norm_offset: bool = False
  # True: queries and keys are RMS-normalised over head_dim before rotation (Qwen 3, Gemma 3).
  qk_norm: bool = False
  # True: x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX).
  parallel_residual: bool = False

  # 'rotary' (Su et al. 2021) or 'learned' (GPT-2).
  positions: str = 'rotary'
  # Rows of the table of learned positions: the longest sequence. Rotary positions have no limit;
  # exported checkpoints then say that this is the length they are for.
  max_length: int = 1024
  # Leading part of each head that is rotated (0.25 for Pythia).
  rotary_fraction: float = 1.0
  # Base of the rotary wavelengths.
  rotary_theta: float = 10_000.0
  # Base for windowed layers, which then ignore `rotary_scaling` (Gemma 3); None: as all layers.
  rotary_local_theta: float | None = None
  # 'none', 'linear' (positions divided by the factor, Chen et al. 2023; Gemma 3) or 'llama3'.
  rotary_scaling: str = 'none'
  # How many times longer contexts get; read unless `rotary_scaling` is 'none'.
  rotary_scaling_factor: float = 1.0
  # 'llama3' only (Llama 3.1 release, values of its checkpoints): wavelengths above
  # original_length / low_factor are stretched, those below original_length / high_factor kept.
  rotary_low_factor: float = 1.0
  rotary_high_factor: float = 4.0
  rotary_original_length: int = 8192

  # Biases of the query, key and value projections (GPT-2, NeoX, Qwen 2).
  qkv_bias: bool = False
  # Bias of the attention's output projection (GPT-2, NeoX).
  out_bias: bool = False
  # Biases of the MLP (GPT-2, NeoX).
  mlp_bias: bool = False
  # True: logits are read out with the embedding table (GPT-2, Gemma, small Llama 3.2 and Qwen).
  tied_embeddings: bool = False
  # Factor on the embeddings (sqrt(width) for Gemma).
  embedding_scale: float = 1.0
  # Factor on the attention scores; None: head_dim ** -0.5. Gemma: query_pre_attn_scalar ** -0.5.
  query_scale: float | None = None
  # How many tokens a windowed layer sees, itself included (Mistral, Gemma); None: no layer has one.
  window: int | None = None
  # One letter a layer, repeated to the depth: 'L' local (windowed), 'G' global. Read if `window` is
  # set. Mistral 'L', Gemma 2 'LG', Gemma 3 'LLLLLG'.
  window_pattern: str = 'L'
  # Scores become cap * tanh(scores / cap) (Gemma 2: 50); None: as they are.
  attention_softcap: float | None = None
  # The same for the logits (Gemma 2: 30).
  logit_softcap: float | None = None

  # Standard deviation of initial weights (GPT-2: 0.02); None: fan_in ** -0.5. Projections that end
  # a residual branch are divided by sqrt(2 * layers) besides (Radford et al. 2019).
  init_std: float | None = None
  # How it is computed. A stage that starts from another has these from there where they are None.
  # Type of activations and of matrix products: 'float32' or 'bfloat16'. Parameters, norms,
  # softmaxes and log-probs are float32 whatever this says. None: as the start, else 'float32'.
  dtype: str | None = None
  # What computes attention over whole sequences (decoding steps are always plain): 'xla', plain and
  # everywhere; 'cudnn', NVIDIA GPUs in bfloat16; 'splash', TPUs; 'tokamax', the kernel which that
  # library finds for the device (extra `kernels`); 'auto': cudnn, splash or xla, whichever can.
  attention: str = 'xla'
  # How many ids' logits each device holds at a time where responses are scored: log-probs and
  # entropies then never need [rows, response, vocabulary] float32 logits, which their backward pass
  # computes again. 0: all at once, which is faster where they fit. None: as the start, else 0.
  vocab_chunk: int | None = None
  # What a block's backward pass recomputes: 'none', 'dots' (all but matrix products), 'full' (all).
  # None: as the start, else 'none'.
  remat: str | None = None
  # True: one compiled block, scanned over the layers (deep models: compile time). False: unrolled,
  # which is faster for small models and for decoding. None: as the start, else False.
  scan_layers: bool | None = None

  @property
  def compute_dtype(self) -> str:
    """Type of activations, with the default filled in."""
    return 'float32' if self.dtype is None else self.dtype

  @property
  def ids_at_once(self) -> int | None:
    """How many ids' logits are held at a time; None: all."""
    return self.vocab_chunk or None

  @property
  def remat_policy(self) -> str:
    """What a backward pass recomputes, with the default filled in."""
    return 'none' if self.remat is None else self.remat

  @property
  def scanned(self) -> bool:
    """Whether there is one compiled block, with the default filled in."""
    return bool(self.scan_layers)

  @property
  def num_kv_heads(self) -> int:
    """Key and value heads, with the default filled in."""
    return self.heads if self.kv_heads is None else self.kv_heads

  @property
  def size_per_head(self) -> int:
    """Width of one head, with the default filled in."""
    return self.width // self.heads if self.head_dim is None else self.head_dim

  @property
  def rotary_dim(self) -> int:
    """How many leading entries of a head are rotated."""
    return int(self.size_per_head * self.rotary_fraction)

  @property
  def attention_scale(self) -> float:
    """Factor on the attention scores, with the default filled in."""
    return self.size_per_head**-0.5 if self.query_scale is None else self.query_scale

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding tables."""
    return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

  def is_local(self) -> tuple[bool, ...]:
    """For each layer, whether it sees only a window."""
    if self.window is None:
      return (False,) * self.layers
    pattern = self.window_pattern
    return tuple(pattern[layer % len(pattern)] == 'L' for layer in range(self.layers))

  def with_vocabulary(self, size: int, path: str = 'model') -> 'ModelConfig':
    """This decoder for a tokenizer of `size` ids; raises ConfigError if it has room for fewer."""
    if self.vocab_size == 0:
      return dataclasses.replace(self, vocab_size=size)
    if self.vocab_size < size:
      raise ConfigError(
        f'{path}.vocab_size',
        self.vocab_size,
        f'at least {size}, the number of ids of the tokenizer',
        f'{path}.vocab_size=0 takes that number.',
      )
    return self

  def validate(self, path: str) -> None:
    """Raises ConfigError, naming the field below `path`, for values that cannot work together."""
    _check_choices(self, path)
    _check_sizes(self, path)
    _check_attention(self, path)
    _check_positions(self, path)


def _check_choices(config: ModelConfig, path: str) -> None:
  choices = {
    'activation': ACTIVATIONS,
    'norm': NORMS,
    'norm_placement': NORM_PLACEMENTS,
    'positions': POSITIONS,
    'rotary_scaling': ROTARY_SCALINGS,
    'dtype': (*DTYPES, None),
    'remat': (*REMATS, None),
    'attention': ATTENTIONS,
  }
  for name, allowed in choices.items():
    value = getattr(config, name)
    if value not in allowed:
      raise ConfigError(f'{path}.{name}', value, f'one of {", ".join(map(str, allowed))}')
  if config.parallel_residual and config.norm_placement == 'post':
    raise ConfigError(
      f'{path}.parallel_residual',
      True,
      f"False with {path}.norm_placement='post', which norms each sum by itself",
      "Use norm_placement 'pre' (GPT-NeoX) or 'sandwich'.",
    )


def _check_sizes(config: ModelConfig, path: str) -> None:
  if config.vocab_size < 0:
    raise ConfigError(
      f'{path}.vocab_size', config.vocab_size, "a positive number, or 0 for the tokenizer's size"
    )
  if config.vocab_chunk is not None and config.vocab_chunk < 0:
    raise ConfigError(
      f'{path}.vocab_chunk', config.vocab_chunk, 'a positive number, or 0 for all ids at once'
    )
  names = ['vocab_multiple', 'width', 'layers', 'heads', 'mlp_width', 'norm_epsilon', 'max_length']
  names += ['embedding_scale']
  optional = ['kv_heads', 'head_dim', 'query_scale', 'window', 'attention_softcap']
  optional += ['logit_softcap', 'init_std', 'rotary_local_theta']
  names += [name for name in optional if getattr(config, name) is not None]
  for name in names:
    value = getattr(config, name)
    if not (value > 0 and math.isfinite(value)):
      raise ConfigError(f'{path}.{name}', value, 'a positive finite number')


def _check_attention(config: ModelConfig, path: str) -> None:
  if config.head_dim is None and config.width % config.heads:
    raise ConfigError(
      f'{path}.heads',
      config.heads,
      f'a divisor of {path}.width={config.width}',
      f'Change one of them, or set {path}.head_dim.',
    )
  if config.heads % config.num_kv_heads:
    raise ConfigError(
      f'{path}.kv_heads',
      config.kv_heads,
      f'a divisor of {path}.heads={config.heads}',
      'Each key head serves the same number of query heads.',
    )
  if config.window is None and config.window_pattern != 'L':
    raise ConfigError(
      f'{path}.window_pattern',
      config.window_pattern,
      f"'L' without {path}.window: no layer is windowed",
      f'Set {path}.window.',
    )
  if not config.window_pattern or set(config.window_pattern) - {'L', 'G'}:
    raise ConfigError(
      f'{path}.window_pattern',
      config.window_pattern,
      "letters 'L' (local) and 'G' (global), at least one",
      "For example 'LG' alternates, as in Gemma 2.",
    )


def _check_positions(config: ModelConfig, path: str) -> None:
  if not 0.0 < config.rotary_fraction <= 1.0:
    raise ConfigError(
      f'{path}.rotary_fraction',
      config.rotary_fraction,
      'a number above 0 and at most 1',
      f"For no rotation at all, set {path}.positions='learned'.",
    )
  if config.positions == 'rotary' and (config.rotary_dim < 2 or config.rotary_dim % 2):
    raise ConfigError(
      f'{path}.rotary_fraction',
      config.rotary_fraction,
      f'a fraction that rotates an even number of the {config.size_per_head} entries of a head, at '
      f'least 2 (it gives {config.rotary_dim})',
      f'Change it, or the head width ({path}.head_dim, {path}.width / {path}.heads).',
    )
  names = ['rotary_theta', 'rotary_low_factor', 'rotary_original_length']
  for name in names:
    if not getattr(config, name) > 0:
      raise ConfigError(f'{path}.{name}', getattr(config, name), 'a positive number')
  if config.rotary_scaling == 'none' and config.rotary_scaling_factor != 1.0:
    raise ConfigError(
      f'{path}.rotary_scaling_factor',
      config.rotary_scaling_factor,
      f"1.0 with {path}.rotary_scaling='none'",
      f"Choose {path}.rotary_scaling 'linear' or 'llama3'.",
    )
  if config.rotary_scaling_factor < 1.0:
    raise ConfigError(
      f'{path}.rotary_scaling_factor', config.rotary_scaling_factor, 'a factor of at least 1'
    )
  if config.rotary_high_factor <= config.rotary_low_factor:
    raise ConfigError(
      f'{path}.rotary_high_factor',
      config.rotary_high_factor,
      f'more than {path}.rotary_low_factor={config.rotary_low_factor}',
    )
  if config.rotary_local_theta is not None and config.window is None:
    raise ConfigError(
      f'{path}.rotary_local_theta',
      config.rotary_local_theta,
      f'None without {path}.window: no layer is windowed',
      f'Set {path}.window, or leave the local base out.',
    )
