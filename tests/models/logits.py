"""The logits from which responses are drawn, for what tests make of them."""

import jax

from rlhf_jax.common.types import Sequences
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig


def response_logits(
  config: ModelConfig, params: roles.Params, sequences: Sequences, temperature: float
) -> jax.Array:
  """`[B, R, V]` float32, over the temperature."""
  states = roles.response_states(config, params, sequences)
  return decoder.logits(config, params, states) / temperature
