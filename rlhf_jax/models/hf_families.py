"""The table of model families of the Hugging Face world that the one decoder covers.

A row says how a config.json becomes a `ModelConfig` and back, and where each parameter lies in the
checkpoint's tensors. Facts are those of transformers 5 (its `configuration_*.py` and
`modeling_*.py`); older files are read too.
"""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_jax.models import hf_config
from rlhf_jax.models.hf_config import Aspect


class Tensor(NamedTuple):
  """Where a parameter lies in a checkpoint.

  Attributes:
    name: of the tensor, with {} for the number of the layer.
    layout: how its axes are ours; see `hf_layout`.
    part: of a fused tensor, which one.
  """

  name: str
  layout: str
  part: int = 0


class Family(NamedTuple):
  """One row of the table.

  Attributes:
    name: what it is called in tables and messages.
    model_type: of config.json.
    causal_lm: transformers' class of the policy.
    classifier: that of reward models and value functions.
    prefix: what the names of the trunk's tensors start with in those classes, and do not in files
      of the trunk alone.
    tensors: by the name of the parameter (`common.trees.flatten`).
    fields: fields of `ModelConfig` and the key each is read from.
    defaults: what transformers takes a missing key to be.
    fixed: fields of `ModelConfig` that are the same for the whole family.
    aspects: what takes more than a key.
    only: keys that must have this value, where they are given.
    aliases: other names that files give to a tensor.
  """

  name: str
  model_type: str
  causal_lm: str
  classifier: str
  prefix: str
  tensors: Mapping[str, Tensor]
  fields: Mapping[str, str]
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any]
  aspects: tuple[Aspect, ...] = ()
  only: Mapping[str, Any] = types.MappingProxyType({})
  aliases: Mapping[str, str] = types.MappingProxyType({})


_LLAMA_TENSORS = {
  'embedding': Tensor('model.embed_tokens.weight', 'v d'),
  'unembedding': Tensor('lm_head.weight', 'v d -> d v'),
  'final_norm.scale': Tensor('model.norm.weight', 'd'),
  'layers.attention_norm.scale': Tensor('model.layers.{}.input_layernorm.weight', 'd'),
  'layers.mlp_norm.scale': Tensor('model.layers.{}.post_attention_layernorm.weight', 'd'),
  'layers.query.kernel': Tensor('model.layers.{}.self_attn.q_proj.weight', '(h k) d -> d h k'),
  'layers.key.kernel': Tensor('model.layers.{}.self_attn.k_proj.weight', '(g k) d -> d g k'),
  'layers.value.kernel': Tensor('model.layers.{}.self_attn.v_proj.weight', '(g k) d -> d g k'),
  'layers.query.bias': Tensor('model.layers.{}.self_attn.q_proj.bias', '(h k) -> h k'),
  'layers.key.bias': Tensor('model.layers.{}.self_attn.k_proj.bias', '(g k) -> g k'),
  'layers.value.bias': Tensor('model.layers.{}.self_attn.v_proj.bias', '(g k) -> g k'),
  'layers.out.kernel': Tensor('model.layers.{}.self_attn.o_proj.weight', 'd (h k) -> h k d'),
  'layers.out.bias': Tensor('model.layers.{}.self_attn.o_proj.bias', 'd'),
  'layers.query_norm.scale': Tensor('model.layers.{}.self_attn.q_norm.weight', 'k'),
  'layers.key_norm.scale': Tensor('model.layers.{}.self_attn.k_norm.weight', 'k'),
  'layers.mlp.gate.kernel': Tensor('model.layers.{}.mlp.gate_proj.weight', 'm d -> d m'),
  'layers.mlp.up.kernel': Tensor('model.layers.{}.mlp.up_proj.weight', 'm d -> d m'),
  'layers.mlp.down.kernel': Tensor('model.layers.{}.mlp.down_proj.weight', 'd m -> m d'),
  'layers.mlp.gate.bias': Tensor('model.layers.{}.mlp.gate_proj.bias', 'm'),
  'layers.mlp.up.bias': Tensor('model.layers.{}.mlp.up_proj.bias', 'm'),
  'layers.mlp.down.bias': Tensor('model.layers.{}.mlp.down_proj.bias', 'd'),
}

_GEMMA_TENSORS = _LLAMA_TENSORS | {
  'layers.attention_post_norm.scale': Tensor(
    'model.layers.{}.post_attention_layernorm.weight', 'd'
  ),
  'layers.mlp_norm.scale': Tensor('model.layers.{}.pre_feedforward_layernorm.weight', 'd'),
  'layers.mlp_post_norm.scale': Tensor('model.layers.{}.post_feedforward_layernorm.weight', 'd'),
}

# Query, key and value of all heads side by side. Matrices are [inputs, outputs], as ours are.
_GPT2_TENSORS = {
  'embedding': Tensor('transformer.wte.weight', 'v d'),
  'positions': Tensor('transformer.wpe.weight', 'p d'),
  'unembedding': Tensor('lm_head.weight', 'v d -> d v'),
  'final_norm.scale': Tensor('transformer.ln_f.weight', 'd'),
  'final_norm.bias': Tensor('transformer.ln_f.bias', 'd'),
  'layers.attention_norm.scale': Tensor('transformer.h.{}.ln_1.weight', 'd'),
  'layers.attention_norm.bias': Tensor('transformer.h.{}.ln_1.bias', 'd'),
  'layers.mlp_norm.scale': Tensor('transformer.h.{}.ln_2.weight', 'd'),
  'layers.mlp_norm.bias': Tensor('transformer.h.{}.ln_2.bias', 'd'),
  **{
    f'layers.{name}.kernel': Tensor(
      'transformer.h.{}.attn.c_attn.weight', 'd (3 h k) -> d h k', part
    )
    for part, name in enumerate(('query', 'key', 'value'))
  },
  **{
    f'layers.{name}.bias': Tensor('transformer.h.{}.attn.c_attn.bias', '(3 h k) -> h k', part)
    for part, name in enumerate(('query', 'key', 'value'))
  },
  'layers.out.kernel': Tensor('transformer.h.{}.attn.c_proj.weight', '(h k) d -> h k d'),
  'layers.out.bias': Tensor('transformer.h.{}.attn.c_proj.bias', 'd'),
  'layers.mlp.up.kernel': Tensor('transformer.h.{}.mlp.c_fc.weight', 'd m'),
  'layers.mlp.up.bias': Tensor('transformer.h.{}.mlp.c_fc.bias', 'm'),
  'layers.mlp.down.kernel': Tensor('transformer.h.{}.mlp.c_proj.weight', 'm d'),
  'layers.mlp.down.bias': Tensor('transformer.h.{}.mlp.c_proj.bias', 'd'),
}

# Query, key and value side by side within each head.
_NEOX_TENSORS = {
  'embedding': Tensor('gpt_neox.embed_in.weight', 'v d'),
  'unembedding': Tensor('embed_out.weight', 'v d -> d v'),
  'final_norm.scale': Tensor('gpt_neox.final_layer_norm.weight', 'd'),
  'final_norm.bias': Tensor('gpt_neox.final_layer_norm.bias', 'd'),
  'layers.attention_norm.scale': Tensor('gpt_neox.layers.{}.input_layernorm.weight', 'd'),
  'layers.attention_norm.bias': Tensor('gpt_neox.layers.{}.input_layernorm.bias', 'd'),
  'layers.mlp_norm.scale': Tensor('gpt_neox.layers.{}.post_attention_layernorm.weight', 'd'),
  'layers.mlp_norm.bias': Tensor('gpt_neox.layers.{}.post_attention_layernorm.bias', 'd'),
  **{
    f'layers.{name}.kernel': Tensor(
      'gpt_neox.layers.{}.attention.query_key_value.weight', '(h 3 k) d -> d h k', part
    )
    for part, name in enumerate(('query', 'key', 'value'))
  },
  **{
    f'layers.{name}.bias': Tensor(
      'gpt_neox.layers.{}.attention.query_key_value.bias', '(h 3 k) -> h k', part
    )
    for part, name in enumerate(('query', 'key', 'value'))
  },
  'layers.out.kernel': Tensor('gpt_neox.layers.{}.attention.dense.weight', 'd (h k) -> h k d'),
  'layers.out.bias': Tensor('gpt_neox.layers.{}.attention.dense.bias', 'd'),
  'layers.mlp.up.kernel': Tensor('gpt_neox.layers.{}.mlp.dense_h_to_4h.weight', 'm d -> d m'),
  'layers.mlp.up.bias': Tensor('gpt_neox.layers.{}.mlp.dense_h_to_4h.bias', 'm'),
  'layers.mlp.down.kernel': Tensor('gpt_neox.layers.{}.mlp.dense_4h_to_h.weight', 'd m -> m d'),
  'layers.mlp.down.bias': Tensor('gpt_neox.layers.{}.mlp.dense_4h_to_h.bias', 'd'),
}

_FIELDS = {
  'vocab_size': 'vocab_size',
  'width': 'hidden_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'mlp_width': 'intermediate_size',
  'activation': 'hidden_act',
  'norm_epsilon': 'rms_norm_eps',
  'max_length': 'max_position_embeddings',
  'init_std': 'initializer_range',
  'tied_embeddings': 'tie_word_embeddings',
}
_ATTENTION_BIAS = {'qkv_bias': 'attention_bias', 'out_bias': 'attention_bias'}

_DEFAULTS = {
  'vocab_size': 32000,
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': None,
  'head_dim': None,
  'intermediate_size': 11008,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 2048,
  'initializer_range': 0.02,
  'tie_word_embeddings': False,
}
_QWEN_DEFAULTS = _DEFAULTS | {
  'vocab_size': 151936,
  'num_key_value_heads': 32,
  'intermediate_size': 22016,
  'max_position_embeddings': 32768,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
  'layer_types': None,
}
_GEMMA_DEFAULTS = {
  'vocab_size': 256000,
  'hidden_size': 2304,
  'num_hidden_layers': 26,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'intermediate_size': 9216,
  'hidden_activation': 'gelu_pytorch_tanh',
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 8192,
  'initializer_range': 0.02,
  'tie_word_embeddings': True,
  'attention_bias': False,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'layer_types': None,
  'final_logit_softcapping': 30.0,
  'attn_logit_softcapping': 50.0,
}
_GEMMA_FIELDS = {
  **_FIELDS,
  **_ATTENTION_BIAS,
  'head_dim': 'head_dim',
  'activation': 'hidden_activation',
  'logit_softcap': 'final_logit_softcapping',
}
_GEMMA_FIXED = {'norm_placement': 'sandwich', 'norm_offset': True}
_GEMMA_ONLY = {'use_bidirectional_attention': False}

FAMILIES: tuple[Family, ...] = (
  Family(
    'Llama 2, 3, 3.x',
    'llama',
    'LlamaForCausalLM',
    'LlamaForSequenceClassification',
    'model.',
    _LLAMA_TENSORS,
    {**_FIELDS, **_ATTENTION_BIAS, 'head_dim': 'head_dim', 'mlp_bias': 'mlp_bias'},
    {**_DEFAULTS, 'attention_bias': False, 'mlp_bias': False},
    {},
    (hf_config.ROTARY,),
  ),
  Family(
    'Mistral',
    'mistral',
    'MistralForCausalLM',
    'MistralForSequenceClassification',
    'model.',
    _LLAMA_TENSORS,
    {**_FIELDS, 'head_dim': 'head_dim'},
    {
      **_DEFAULTS,
      'intermediate_size': 14336,
      'num_key_value_heads': 8,
      'max_position_embeddings': 4096 * 32,
      'sliding_window': 4096,
    },
    {},
    (hf_config.ROTARY, hf_config.MISTRAL_WINDOWS),
  ),
  Family(
    'Qwen 2, 2.5',
    'qwen2',
    'Qwen2ForCausalLM',
    'Qwen2ForSequenceClassification',
    'model.',
    _LLAMA_TENSORS,
    {**_FIELDS, 'head_dim': 'head_dim'},
    _QWEN_DEFAULTS,
    {'qkv_bias': True},
    (hf_config.ROTARY, hf_config.QWEN_WINDOWS),
  ),
  Family(
    'Qwen 3',
    'qwen3',
    'Qwen3ForCausalLM',
    'Qwen3ForSequenceClassification',
    'model.',
    _LLAMA_TENSORS,
    {**_FIELDS, **_ATTENTION_BIAS, 'head_dim': 'head_dim'},
    {**_QWEN_DEFAULTS, 'head_dim': 128, 'attention_bias': False},
    {'qk_norm': True},
    (hf_config.ROTARY, hf_config.QWEN_WINDOWS),
  ),
  Family(
    'Gemma 2',
    'gemma2',
    'Gemma2ForCausalLM',
    'Gemma2ForSequenceClassification',
    'model.',
    _GEMMA_TENSORS,
    {**_GEMMA_FIELDS, 'attention_softcap': 'attn_logit_softcapping'},
    _GEMMA_DEFAULTS,
    _GEMMA_FIXED,
    (hf_config.ROTARY, hf_config.GEMMA2_WINDOWS, hf_config.GEMMA_SCALES),
    _GEMMA_ONLY,
  ),
  Family(
    'Gemma 3 (text)',
    'gemma3_text',
    'Gemma3ForCausalLM',
    'Gemma3TextForSequenceClassification',
    'model.',
    _GEMMA_TENSORS,
    _GEMMA_FIELDS,
    {
      **_GEMMA_DEFAULTS,
      'vocab_size': 262_208,
      'max_position_embeddings': 131_072,
      'final_logit_softcapping': None,
      'attn_logit_softcapping': None,
    },
    {**_GEMMA_FIXED, 'qk_norm': True},
    (hf_config.GEMMA3_WINDOWS, hf_config.GEMMA_SCALES),
    # Its attention of transformers 5 has the setting, and does not read it.
    {**_GEMMA_ONLY, 'attn_logit_softcapping': None},
  ),
  Family(
    'GPT-NeoX (Pythia)',
    'gpt_neox',
    'GPTNeoXForCausalLM',
    'GPTNeoXForSequenceClassification',
    'gpt_neox.',
    _NEOX_TENSORS,
    {
      **{name: key for name, key in _FIELDS.items() if name != 'kv_heads'},
      **_ATTENTION_BIAS,
      'norm_epsilon': 'layer_norm_eps',
      'parallel_residual': 'use_parallel_residual',
    },
    {
      'vocab_size': 50432,
      'hidden_size': 6144,
      'num_hidden_layers': 44,
      'num_attention_heads': 64,
      'intermediate_size': 24576,
      'hidden_act': 'gelu',
      'layer_norm_eps': 1e-5,
      'max_position_embeddings': 2048,
      'initializer_range': 0.02,
      'tie_word_embeddings': False,
      'use_parallel_residual': True,
      'attention_bias': True,
    },
    {'norm': 'layernorm', 'mlp_bias': True, 'gated_mlp': False},
    (hf_config.NEOX_ROTARY,),
    aliases={'embed_out.weight': 'lm_head.weight'},
  ),
  Family(
    'GPT-2',
    'gpt2',
    'GPT2LMHeadModel',
    'GPT2ForSequenceClassification',
    'transformer.',
    _GPT2_TENSORS,
    {
      'vocab_size': 'vocab_size',
      'width': 'n_embd',
      'layers': 'n_layer',
      'heads': 'n_head',
      'activation': 'activation_function',
      'norm_epsilon': 'layer_norm_epsilon',
      'max_length': 'n_positions',
      'init_std': 'initializer_range',
      'tied_embeddings': 'tie_word_embeddings',
    },
    {
      'vocab_size': 50257,
      'n_embd': 768,
      'n_layer': 12,
      'n_head': 12,
      'n_inner': None,
      'activation_function': 'gelu_new',
      'layer_norm_epsilon': 1e-5,
      'n_positions': 1024,
      'initializer_range': 0.02,
      'tie_word_embeddings': True,
    },
    {
      'norm': 'layernorm',
      'positions': 'learned',
      'qkv_bias': True,
      'out_bias': True,
      'mlp_bias': True,
      'gated_mlp': False,
    },
    (hf_config.GPT2_MLP,),
    {
      'scale_attn_weights': True,
      'scale_attn_by_inverse_layer_idx': False,
      'add_cross_attention': False,
    },
  ),
)
