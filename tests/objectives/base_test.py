"""The table of objectives, and what pairs of responses have in common."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives import OBJECTIVES, objective_of
from rlhf_jax.objectives.base import flatten_pairs, of_preferred, pair_logprobs
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
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
  """DPO and PPO always; CPL when it scores log-ratios; SFT and reward models never."""
  needs = {name: objective.reference(objective.config()) for name, objective in OBJECTIVES.items()}
  assert needs == {'sft': False, 'reward_model': False, 'dpo': True, 'cpl': False, 'ppo': True}
  assert objective_of(CPLConfig()).reference(CPLConfig(use_reference=True))
  assert objective_of(PPOConfig()).data == 'prompts'


def test_flattened_pairs_keep_their_order() -> None:
  """Row 2b is the first response of pair b, row 2b + 1 the second."""
  sequences = tabular.make_batch('comparisons').sequences
  flat = flatten_pairs(sequences)
  for name, values in vars(flat).items():
    for b in range(B):
      for which in (0, 1):
        np.testing.assert_array_equal(values[2 * b + which], getattr(sequences, name)[b, which])


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
  return Sequences(**{name: values[b] for name, values in vars(sequences).items()})


def test_of_preferred_takes_the_preferred_and_halves_ties() -> None:
  """The first above 0.5, the second below, their mean at 0.5."""
  values = jnp.array([[1.0, 5.0]] * 5)
  preference = jnp.array([1.0, 0.6, 0.5, 0.4, 0.0])
  np.testing.assert_array_equal(
    quick.jit(of_preferred)(values, preference), [1.0, 1.0, 3.0, 5.0, 5.0]
  )
