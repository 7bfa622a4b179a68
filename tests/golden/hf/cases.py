"""The tiny models that are compared with transformers: fixed ones, and fresh draws of each family.

Settings are those of transformers' configs; what they share is in `TINY`.
"""

from typing import Any

import numpy as np

VOCAB, ROWS, COLUMNS = 37, 3, 10
# Real tokens of each row of a batch; the second copy of the batch is padded on the other side.
LENGTHS = (10, 7, 4)
# Shorter and longer than the rows.
SHORT, LONG = 3, 64

TINY: dict[str, Any] = dict(
  vocab_size=VOCAB,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=24,
  max_position_embeddings=COLUMNS + 2,
)
GPT2: dict[str, Any] = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=12)
LLAMA3_ROPE = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
GEMMA: dict[str, Any] = dict(num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=9)

# (model_type, settings) by name.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  'gpt2': ('gpt2', GPT2),
  'gpt2_untied': ('gpt2', GPT2 | dict(tie_word_embeddings=False, n_inner=20)),
  'gpt_neox': ('gpt_neox', TINY | dict(rotary_pct=0.5)),
  'gpt_neox_sequential': (
    'gpt_neox',
    TINY | dict(rotary_pct=1.0, use_parallel_residual=False, attention_bias=False),
  ),
  'llama2': ('llama', TINY),
  'llama3': (
    'llama',
    TINY
    | dict(
      num_key_value_heads=2, head_dim=6, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
  ),
  'llama_linear': (
    'llama',
    TINY
    | dict(
      num_key_value_heads=1,
      attention_bias=True,
      mlp_bias=True,
      rope_parameters=dict(rope_type='linear', rope_theta=100.0, factor=4.0),
    ),
  ),
  'mistral_short_window': (
    'mistral',
    TINY | dict(num_key_value_heads=2, sliding_window=SHORT),
  ),
  'mistral_long_window': ('mistral', TINY | dict(num_key_value_heads=1, sliding_window=LONG)),
  'qwen2': ('qwen2', TINY | dict(num_key_value_heads=2)),
  'qwen2_windows': (
    'qwen2',
    TINY
    | dict(
      num_key_value_heads=4,
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=SHORT,
      max_window_layers=1,
    ),
  ),
  'qwen3': ('qwen3', TINY | dict(num_key_value_heads=2, head_dim=6, tie_word_embeddings=True)),
  'gemma2': ('gemma2', TINY | GEMMA | dict(sliding_window=SHORT)),
  'gemma2_uncapped': (
    'gemma2',
    TINY
    | GEMMA
    | dict(sliding_window=LONG, attn_logit_softcapping=None, final_logit_softcapping=None),
  ),
  'gemma3': (
    'gemma3_text',
    TINY
    | GEMMA
    | dict(
      num_hidden_layers=3,
      sliding_window=SHORT,
      layer_types=['sliding_attention', 'sliding_attention', 'full_attention'],
      rope_parameters=dict(
        full_attention=dict(rope_type='linear', rope_theta=1000.0, factor=8.0),
        sliding_attention=dict(rope_type='default', rope_theta=50.0),
      ),
    ),
  ),
}
# Models of one score.
SCORERS: dict[str, tuple[str, dict[str, Any]]] = {
  'llama_scorer': CASES['llama2'],
  'gpt2_scorer': CASES['gpt2'],
}


def batches(seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens `[2, B, T]` and masks: the same rows padded on the left, then on the right."""
  tokens = np.random.default_rng(seed).integers(1, VOCAB, (2, ROWS, COLUMNS))
  mask = np.zeros((2, ROWS, COLUMNS), bool)
  for row, length in enumerate(LENGTHS):
    mask[0, row, COLUMNS - length :] = True
    mask[1, row, :length] = True
    tokens[1, row, :length] = tokens[0, row, COLUMNS - length :]
  # Padding is token 0, as a classifier of transformers finds the end of a row by it.
  return np.where(mask, tokens, 0), mask


def draw(model_type: str, rng: np.random.Generator) -> dict[str, Any]:
  """Fresh settings of a family: sizes, grouping, tying, windows, scaling, caps."""

  def pick(*options: Any) -> Any:
    return options[rng.integers(len(options))]

  heads = pick(2, 4, 6)
  size = pick(4, 6, 8)
  sizes = dict(
    vocab_size=VOCAB,
    hidden_size=heads * size,
    num_hidden_layers=pick(1, 2, 3),
    num_attention_heads=heads,
    intermediate_size=pick(20, 28, 44),
    max_position_embeddings=pick(COLUMNS, COLUMNS + 5),
    tie_word_embeddings=pick(True, False),
  )
  layers = sizes['num_hidden_layers']
  # Not 1: the cache of transformers 5.23 keeps all columns then (it slices with [-0:]).
  window = pick(2, SHORT, COLUMNS - 1, LONG)
  kinds = [pick('sliding_attention', 'full_attention') for _ in range(layers)]
  rope = pick(
    dict(rope_type='default', rope_theta=pick(100.0, 10_000.0)),
    dict(rope_type='linear', rope_theta=500.0, factor=pick(2.0, 8.0)),
    LLAMA3_ROPE | dict(factor=pick(2.0, 8.0)),
  )
  grouped = dict(num_key_value_heads=pick(1, 2, heads), rope_parameters=rope)
  wide = dict(head_dim=pick(size, 10))
  if model_type == 'gpt2':
    return dict(
      vocab_size=VOCAB,
      n_embd=sizes['hidden_size'],
      n_layer=layers,
      n_head=heads,
      n_positions=sizes['max_position_embeddings'],
      n_inner=pick(None, 20),
      activation_function=pick('gelu_new', 'gelu'),
      tie_word_embeddings=sizes['tie_word_embeddings'],
    )
  if model_type == 'gpt_neox':
    rope = dict(rope_type='default', rope_theta=100.0, partial_rotary_factor=pick(0.5, 1.0))
    if size == 6:
      rope['partial_rotary_factor'] = 1.0
    neox = dict(use_parallel_residual=pick(True, False), attention_bias=pick(True, False))
    return sizes | neox | dict(rope_parameters=rope, hidden_act=pick('gelu', 'gelu_new'))
  if model_type == 'llama':
    return (
      sizes | grouped | wide | dict(attention_bias=pick(True, False), mlp_bias=pick(True, False))
    )
  if model_type == 'mistral':
    return sizes | grouped | wide | dict(sliding_window=pick(None, window))
  if model_type in ('qwen2', 'qwen3'):
    own = dict(attention_bias=pick(True, False)) | wide if model_type == 'qwen3' else {}
    return (
      sizes
      | grouped
      | own
      | dict(use_sliding_window=True, sliding_window=window, layer_types=kinds)
    )
  gemma = (
    sizes
    | grouped
    | wide
    | dict(query_pre_attn_scalar=pick(6, 16), attention_bias=pick(True, False))
  )
  gemma |= dict(sliding_window=window, layer_types=kinds, final_logit_softcapping=pick(None, 2.0))
  if model_type == 'gemma2':
    return gemma | dict(attn_logit_softcapping=pick(None, 1.5))
  sliding = dict(rope_type='default', rope_theta=pick(50.0, 500.0))
  return gemma | dict(rope_parameters=dict(full_attention=rope, sliding_attention=sliding))
