"""GRPO against Shao et al. 2024, section 4.1, worked token by token in float64 NumPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.objectives.grpo import GRPOConfig, group_advantages, normalized
from tests.objectives import tabular
from tests.objectives.samples import SCORES, collect, make_experience
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
@pytest.mark.parametrize('samples', [2, 4])
def test_advantages_compare_responses_of_a_prompt(scale: str, samples: int) -> None:
  """(R - mean) over the deviation that the scale names, plus 1e-4; one for all tokens."""
  config = GRPOConfig(samples=samples, scale=scale)
  batch, carry, metrics = collect(config, make_experience(np.nan))
  scores, expected = SCORES.astype(np.float64), []
  for i, score in enumerate(scores):
    group = scores[i - i % samples :][:samples]
    deviation = {'group': group.std(ddof=1), 'batch': scores.std(ddof=1)}.get(scale)
    centred = score - group.mean()
    expected.append(centred if deviation is None else centred / (deviation + 1e-4))
  mask = batch.sequences.response_mask
  np.testing.assert_allclose(
    batch.advantages, np.where(mask, np.array(expected)[:, None], 0.0), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(metrics['group_std'], scores.reshape(-1, samples).std(1).mean())
  assert metrics['equal_groups'] == 0.0 and carry == {}


def test_groups_that_are_scored_alike_teach_nothing() -> None:
  """Advantages of 0, not of noise over noise; they are counted."""
  scores = np.array([0.3, 0.3, 1.0, 2.0], np.float32)
  batch, _, metrics = collect(GRPOConfig(samples=2), make_experience(scores=scores))
  np.testing.assert_array_equal(np.asarray(batch.advantages)[:2], 0.0)
  assert metrics['equal_groups'] == 0.5
  with pytest.raises(ShapeError, match='rewards: expected a floating-point array'):
    group_advantages(jnp.array([[1, 2]]), scale='group')
  with pytest.raises(ValueError, match="scale 'row': expected one of"):
    group_advantages(jnp.array([[1.0, 2.0]]), scale='row')


@pytest.mark.parametrize('samples', [3, 5, 7])
def test_rounding_teaches_nothing_either(samples: int) -> None:
  """The mean of equal numbers need not be that number: over epsilon it would be an advantage."""
  rng = np.random.default_rng(0)
  rewards = np.repeat(rng.normal(0, 3, (64, 1)).astype(np.float32), samples, axis=1)
  assert (rewards != np.asarray(jnp.mean(rewards, 1, keepdims=True))).any()
  for scale in ('group', 'batch', 'none'):
    found = group_advantages(jnp.asarray(rewards), scale=scale, epsilon=1e-9)
    np.testing.assert_array_equal(found, 0.0)


def slow(config: GRPOConfig, batch: Any, logprobs: np.ndarray) -> float:
  """Equations 3 and 4, with the named ways to make one number of token losses."""
  rows = []
  for b, mask in enumerate(batch.sequences.response_mask):
    tokens = np.flatnonzero(mask)
    logratios = [logprobs[b, t] - batch.old_logprobs[b, t] for t in tokens]
    losses = []
    for t, logratio in zip(tokens, logratios, strict=True):
      # GSPO, eq. 5: the geometric mean of the tokens' ratios.
      ratio = np.exp(np.mean(logratios) if config.ratio == 'sequence' else logratio)
      advantage = batch.advantages[b, t]
      clipped = min(max(ratio, 1 - config.clip), 1 + config.clip_high)
      d = batch.reference_logprobs[b, t] - logprobs[b, t]
      penalty = config.kl_coefficient * (np.exp(d) - d - 1)
      losses.append(-min(ratio * advantage, clipped * advantage) + penalty)
    rows.append(losses)
  if config.loss_normalization == 'sequence':
    return float(np.mean([np.mean(row) for row in rows]))
  if config.loss_normalization == 'token':
    return float(np.mean(np.concatenate(rows)))
  return float(np.mean([np.sum(row) / config.constant for row in rows]))


@pytest.mark.parametrize(
  'config',
  [
    GRPOConfig(kl_coefficient=0.3),
    GRPOConfig(loss_normalization='token', clip=0.1, clip_high=0.4),
    GRPOConfig(loss_normalization='constant', constant=7.0, kl_coefficient=0.0),
    GRPOConfig(ratio='sequence', clip=0.05, clip_high=0.1),
  ],
  ids=['sequence', 'token, clip higher', 'constant', 'ratio of sequences'],
)
def test_the_loss_equals_equations_3_and_4(config: GRPOConfig) -> None:
  """Values and gradients, some of them clipped."""
  config.validate('objective')
  batch, outputs = make_batch('rollouts'), make_outputs('rollouts')
  assert_equals_slow_loss(
    config, batch, outputs, lambda x: slow(config, batch, x['logprobs']), 'logprobs'
  )
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  assert 0 < metrics['clip_fraction'].value() < 1


def test_an_unknown_normalization_is_refused() -> None:
  """Where it is chosen."""
  with pytest.raises(ValueError, match="normalization 'row': expected one of"):
    normalized(jnp.ones((1, 2)), jnp.ones((1, 2), bool), 'row', 0.0)


@pytest.mark.parametrize(
  ('settings', 'field'),
  [
    ({'samples': 1}, 'samples'),
    ({'epochs': 0}, 'epochs'),
    ({'minibatches': 0}, 'minibatches'),
    ({'clip': 0.0}, 'clip'),
    ({'clip_high': 0.0}, 'clip_high'),
    ({'dual_clip': 1.1}, 'dual_clip'),
    ({'kl_coefficient': -1.0}, 'kl_coefficient'),
    ({'epsilon': 0.0}, 'epsilon'),
    ({'ratio': 'word'}, 'ratio'),
    ({'scale': 'row'}, 'scale'),
    ({'loss_normalization': 'row'}, 'loss_normalization'),
    ({'loss_normalization': 'constant'}, 'constant'),
    ({'constant': 10.0}, 'constant'),
  ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], field: str) -> None:
  """A group of one has nothing to be compared with; the constant belongs to its normalisation."""
  assert_refused(GRPOConfig, settings, field)
