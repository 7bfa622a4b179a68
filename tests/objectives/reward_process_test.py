"""Process reward models, worked step by step in float64 NumPy."""

import numpy as np
import pytest

from rlhf_jax.objectives.reward_process import ProcessRewardConfig
from tests.objectives import tabular
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import assert_equals_slow_loss, make_batch, make_outputs


@pytest.mark.parametrize(
  'config',
  [
    ProcessRewardConfig(between='nothing'),
    ProcessRewardConfig(variant='binary', threshold=0.4, between='nothing'),
  ],
  ids=['squared', 'binary'],
)
def test_the_loss_is_the_mean_over_steps(config: ProcessRewardConfig) -> None:
  """Only the last tokens of steps count; values and gradients."""
  batch, outputs = make_batch('step_ratings'), make_outputs('step_ratings')

  def slow(x: dict[str, np.ndarray]) -> float:
    losses = []
    for index in zip(*np.nonzero(batch.score_mask), strict=True):
      score, rating = x['token_scores'][index], batch.score[index]
      if config.variant == 'squared':
        losses.append((score - rating) ** 2)
      else:
        p = 1 / (1 + np.exp(-score))
        losses.append(-np.log(p if rating > config.threshold else 1 - p))
    return float(np.mean(losses))

  steps = batch.score_mask.sum()
  assert 1 < steps < batch.sequences.response_mask.sum()
  assert_equals_slow_loss(config, batch, outputs, slow, 'token_scores')
  mean, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  assert mean.weight == steps
  if config.variant == 'binary':
    good = batch.score[batch.score_mask] > config.threshold
    assert good.any() and not good.all()
    right = (outputs['token_scores'][batch.score_mask] > 0) == good
    np.testing.assert_allclose(metrics['step_accuracy'].value(), right.mean())


def test_tokens_between_steps_learn_that_they_are_worth_nothing() -> None:
  """By default: a response's token scores then add up to those of its steps."""
  batch, outputs = make_batch('step_ratings'), make_outputs('step_ratings')
  mask = batch.sequences.response_mask
  targets = np.where(batch.score_mask, batch.score, 0.0)

  def slow(x: dict[str, np.ndarray]) -> float:
    return float(np.square(x['token_scores'] - targets)[mask].mean())

  assert_equals_slow_loss(ProcessRewardConfig(), batch, outputs, slow, 'token_scores')


def test_impossible_settings_are_named() -> None:
  """The error has the field's dotted name."""
  assert_refused(ProcessRewardConfig, {'variant': 'cubic'}, 'variant')
  assert_refused(ProcessRewardConfig, {'between': 'one'}, 'between')
  assert_refused(ProcessRewardConfig, {'variant': 'binary'}, 'between')
