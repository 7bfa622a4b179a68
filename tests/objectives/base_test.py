"""The table of objectives, and what pairs of responses have in common."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives import OBJECTIVES, objective_of
from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.objectives.base import flatten_rows, of_preferred, pair_logprobs
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig
from tests import quick
from tests.objectives import tabular
from tests.objectives.tabular import B, R


def test_a_config_selects_its_objective_by_type() -> None:
  """Every row of the table is found from its config, under its name."""
  for name, objective in OBJECTIVES.items():
    assert objective.name == name
    assert objective_of(objective.config()) is objective
  assert len({objective.config for objective in OBJECTIVES.values()}) == len(OBJECTIVES)


def test_a_stranger_selects_nothing() -> None:
  """Neither another type nor a subclass slips through."""

  class MyConfig(DPOConfig):
    pass

  for config in (3, MyConfig()):
    with pytest.raises(TypeError, match='is not the config of any objective'):
      objective_of(config)  # type: ignore[arg-type]


def test_which_objectives_need_the_reference() -> None:
  """By default; those that learn from samples always, whose responses carry its log-probs."""
  needs = {name for name, row in OBJECTIVES.items() if row.reference(row.config())}
  samplers = {name for name, row in OBJECTIVES.items() if row.data == 'prompts'}
  assert samplers == {
    'ppo', 'rloo', 'reinforce', 'reinforce_pp', 'grpo', 'online_dpo', 'best_of_n',
    'tilted_bc',
  }  # fmt: skip
  assert needs == {'dpo', 'kto', 'alol', *samplers}


@pytest.mark.parametrize(
  ('config', 'needed'),
  [
    (CPLConfig(use_reference=True), True),
    (DenseCPLConfig(use_reference=True), True),
    (ALoLConfig(variant='kl'), True),
    (ALoLConfig(variant='reference_free'), False),
  ],
)
def test_variants_that_need_another_reference(config: Any, needed: bool) -> None:
  """CPL when it scores log-ratios; A-LoL but where it does without."""
  assert objective_of(config).reference(config) == needed


def test_rows_of_the_table_are_whole() -> None:
  """What learns from samples collects them; only ratings are curated; rewards need no policy."""
  for objective in OBJECTIVES.values():
    assert (objective.collect is not None) == (objective.data == 'prompts'), objective.name
    assert objective.curate is None or objective.data == 'ratings', objective.name
    assert (objective.difference is not None) == (objective.data == 'comparisons'), objective.name
    rewards = objective.name.startswith('reward_')
    assert (objective.trains == 'reward_model') == rewards, objective.name
    carry = objective.carry(objective.config())
    assert carry == {} or objective.data == 'prompts', objective.name


@pytest.mark.parametrize('kind', ['comparisons', 'rankings'])
def test_flattened_rows_keep_their_order(kind: str) -> None:
  """Row K b + k is response k of row b."""
  sequences = tabular.make_batch(kind).sequences
  flat = flatten_rows(sequences)
  responses = sequences.response.shape[1]
  for values, given in zip(jax.tree.leaves(flat), jax.tree.leaves(sequences), strict=True):
    for b, k in np.ndindex(B, responses):
      np.testing.assert_array_equal(values[responses * b + k], given[b, k])


def test_single_responses_are_flat_already() -> None:
  """Nothing is done to them."""
  sequences = tabular.make_batch('demonstrations')
  assert flatten_rows(sequences) is sequences


def test_pair_logprobs_equal_those_of_single_responses() -> None:
  """One forward pass over 2B rows gives each response the log-probs it has alone."""
  pairs, tables = tabular.make_batch('comparisons'), tabular.make_tables()
  logprobs = quick.jit(lambda rows: pair_logprobs(tabular.TABLES, tables, rows))(pairs)
  assert logprobs.shape == (B, 2, R)
  single = quick.jit(lambda rows: tabular.table_policy(tables, rows).logprobs)
  for b in range(B):
    alone = single(row_of(pairs.sequences, b))
    np.testing.assert_allclose(logprobs[b], alone, rtol=1e-6)


def row_of(sequences: Sequences, b: int) -> Sequences:
  """Pair b alone, `[2, ...]`."""
  return jax.tree.map(lambda values: values[b], sequences)


def test_of_preferred_takes_the_preferred_and_halves_ties() -> None:
  """The first above 0.5, the second below, their mean at 0.5."""
  values = jnp.array([[1.0, 5.0]] * 5)
  preference = jnp.array([1.0, 0.6, 0.5, 0.4, 0.0])
  np.testing.assert_array_equal(
    quick.jit(of_preferred)(values, preference), [1.0, 1.0, 3.0, 5.0, 5.0]
  )


@pytest.mark.parametrize(
  ('config', 'field', 'where'),
  [
    (ALoLConfig(kl_coefficient=0.2), 'kl_coefficient', "variant 'sequence'"),
    (ALoLConfig(variant='kl', clip=0.2), 'clip', "variant 'kl'"),
    (ALoLConfig(variant='reference_free', clip=0.2), 'clip', "variant 'reference_free'"),
    (ReinforceConfig(baseline='batch', baseline_decay=0.5), 'baseline_decay', "baseline 'batch'"),
    (WeightedBCConfig(temperature=2.0), 'temperature', "variant 'filtered'"),
    (WeightedBCConfig(variant='weighted', keep=0.5), 'keep', "variant 'weighted'"),
  ],
)
def test_what_nothing_reads_is_refused(config: Any, field: str, where: str) -> None:
  """A field of another variant would be ignored in silence. (A weight of 0 switches a term off, as
  sweeps do, and what shapes that term may stay as it is.)
  """
  with pytest.raises(ConfigError) as caught:
    config.validate('objective')
  assert caught.value.field == f'objective.{field}' and where in str(caught.value)


def test_what_is_read_is_fine() -> None:
  ALoLConfig(variant='kl', kl_coefficient=0.2).validate('objective')
  ALoLConfig(variant='token', clip=0.2).validate('objective')
  WeightedBCConfig(variant='weighted', temperature=2.0, max_weight=3.0).validate('objective')
  DPOConfig(nll_coefficient=0.0, nll_normalization='token').validate('objective')
