"""Blocks one by one; how they run is tested with the decoder."""

import jax
import numpy as np

from rlhf_jax.models import adapters, blocks, decoder
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig

MODEL = ModelConfig(vocab_size=11, width=8, layers=3, heads=2, mlp_width=8)


def test_parted_blocks_are_those_of_the_stacks() -> None:
  """From the lowest up, of one stack or of two; parting twice changes nothing."""
  params = decoder.init(MODEL, jax.random.key(0))
  two = adapters.base_of(AdapterConfig(method='last_layers', last_layers=1), params)
  for whole in (params, two):
    parted = blocks.unstack_layers(whole)
    assert blocks.unstack_layers(parted) is parted and 'top_layers' not in parted
    assert len(parted['layers']) == 3
    for number, layer in enumerate(parted['layers']):
      expected = jax.tree.map(lambda stack, i=number: stack[i], params['layers'])
      jax.tree.map(np.testing.assert_array_equal, layer, expected)
