"""What is true of each objective where the policy still is the reference.

Log-ratios are 0 there, so that a penalty for leaving the reference has no gradient, and what is
left of a loss is known in closed form.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.kto import KTOConfig, ReferencedRatings, prepare
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from tests import quick
from tests.objectives import samples, tabular
from tests.objectives.tabular import make_batch, make_outputs


def slopes_at_the_reference(config: Any, kind: str, batch: Any) -> tuple[float, np.ndarray]:
  """Loss and its gradient by log-probs, where these are the reference's."""
  outputs = make_outputs(kind)
  outputs['logprobs'] = batch.reference_logprobs
  loss, slopes = tabular.direct_loss(config, outputs, batch)
  return loss, slopes['logprobs']


DPO = {
  'sigmoid': (DPOConfig(), np.log(2), 0.1 / 2),
  'cdpo': (DPOConfig(label_smoothing=0.1), np.log(2), 0.1 * (0.9 - 0.5)),
  'robust': (DPOConfig(variant='robust', label_smoothing=0.1), np.log(2), 0.1 / 2 / (1 - 0.2)),
  'ipo': (DPOConfig(variant='ipo'), 25.0, 2 * 5.0),
  'hinge': (DPOConfig(variant='hinge'), 1.0, 0.1),
}


@pytest.mark.parametrize(('config', 'loss', 'slope'), DPO.values(), ids=DPO)
def test_dpo_moves_both_responses_of_a_pair_alike(config: Any, loss: float, slope: float) -> None:
  """Each chosen token up and each rejected one down by the same, whatever the pair says.

  A tie has no gradient at all; a soft label p that of the difference 2 p - 1.
  """
  batch = make_batch('comparisons')
  found, slopes = slopes_at_the_reference(config, 'comparisons', batch)
  np.testing.assert_allclose(found, loss, rtol=1e-6)
  verdict = 2 * batch.preference - 1
  expected = verdict[:, None, None] * np.array([[-slope], [slope]]) / len(verdict)
  mask = batch.sequences.response_mask
  np.testing.assert_allclose(slopes, np.where(mask, expected, 0.0), rtol=1e-5, atol=1e-8)
  np.testing.assert_allclose(slopes[batch.preference == 0.5], 0.0, atol=1e-9)


@pytest.mark.parametrize('lam', [1.0, 0.5])
def test_a_tie_of_cpl_is_at_rest_only_without_its_bias(lam: float) -> None:
  """CPL-KL: the bias lifts both segments of a tie by alpha (1 - lambda) / 4."""
  batch = make_batch('comparisons')
  tied = batch.replace(preference=np.full(4, 0.5, np.float32))
  config = CPLConfig(use_reference=True, lam=lam, alpha=0.2)
  _, slopes = slopes_at_the_reference(config, 'comparisons', tied)
  mask = batch.sequences.response_mask
  expected = np.where(mask, -0.2 * (1 - lam) / 4 / 4, 0.0)
  np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-9)


def test_unbiased_cpl_is_dpo() -> None:
  """With lambda 1 and log-ratios for scores, at the reference and elsewhere."""
  batch, outputs = make_batch('comparisons'), make_outputs('comparisons')
  ours = tabular.direct_loss(CPLConfig(use_reference=True, lam=1.0, alpha=0.3), outputs, batch)
  expected = tabular.direct_loss(DPOConfig(beta=0.3), outputs, batch)
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(ours[1]['logprobs'], expected[1]['logprobs'], rtol=1e-5, atol=1e-8)


def test_dense_cpl_of_all_orders_is_at_rest() -> None:
  """Without its bias: a ranking and its reverse, weighed alike, pull equally."""
  batch = make_batch('rankings')
  config = DenseCPLConfig(use_reference=True, lam=1.0)
  _, forward = slopes_at_the_reference(config, 'rankings', batch)
  _, backward = slopes_at_the_reference(config, 'rankings', batch.replace(rank=-batch.rank))
  assert forward.any()
  np.testing.assert_allclose(forward, -backward, atol=1e-9)


def test_kto_values_good_and_bad_alike() -> None:
  """Loss is half of each weight; the same response, once good and once bad, is at rest.

  The reference point is exactly 0.
  """
  ratings = make_batch('ratings')
  tables = tabular.make_tables()
  policy = quick.jit(lambda rows: tabular.table_policy(tables, rows).logprobs)
  ratings = ratings.replace(reference_logprobs=np.asarray(policy(ratings.sequences)))
  config = KTOConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.7)
  run = quick.jit(lambda rows: prepare(config, tabular.TABLES, tables, tables, rows))
  np.testing.assert_array_equal(run(ratings).reference_point, 0.0)

  def slopes(sign: float, weights: KTOConfig) -> tuple[float, np.ndarray]:
    rated = ratings.replace(score=np.full(4, sign, np.float32))
    outputs = make_outputs('ratings') | {'logprobs': ratings.reference_logprobs}
    batch = ReferencedRatings(rated, jnp.zeros(4))
    loss, found = tabular.direct_loss(weights, outputs, batch)
    return loss, found['logprobs']

  mask = ratings.sequences.response_mask
  for sign, weight in ((1.0, 1.3), (-1.0, 0.7)):
    loss, found = slopes(sign, config)
    np.testing.assert_allclose(loss, weight / 2, rtol=1e-6)
    expected = np.where(mask, -sign * weight * 0.4 / 4 / 4, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
  even = KTOConfig()
  np.testing.assert_allclose(slopes(1.0, even)[1] + slopes(-1.0, even)[1], 0.0, atol=1e-9)


@pytest.mark.parametrize('variant', ['sequence', 'token', 'reference_free', 'kl'])
def test_importance_weights_of_alol_are_one(variant: str) -> None:
  """-A a token for all variants; the penalty, on data the policy did not sample, adds its weight.

  (log pi - log pi_ref is no divergence of a response that was given.)
  """
  batch = make_batch('ratings')
  config = ALoLConfig(variant=variant, kl_coefficient=0.3)
  _, slopes = slopes_at_the_reference(config, 'ratings', batch)
  added = 0.3 if variant == 'kl' else 0.0
  mask = batch.sequences.response_mask
  expected = np.where(mask, (-batch.score[:, None] + added) / 4, 0.0)
  np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-8)


def test_online_dpo_moves_what_is_told_apart() -> None:
  """As DPO; groups that are scored alike have exactly no gradient."""
  batch = make_batch('online_pairs')
  _, slopes = slopes_at_the_reference(OnlineDPOConfig(), 'online_pairs', batch)
  apart = (batch.margin > 0)[:, None, None]
  mask = batch.sequences.response_mask & apart
  expected = np.where(mask, np.array([[-0.05], [0.05]]) / apart.sum(), 0.0)
  np.testing.assert_allclose(slopes, expected, rtol=1e-5)
  np.testing.assert_array_equal(slopes[~mask], 0.0)


PENALISED = (RLOOConfig, ReinforceConfig, ReinforcePPConfig, PPOConfig)


@pytest.mark.parametrize('kind', PENALISED)
def test_a_penalty_in_the_rewards_is_nothing_yet(kind: Any) -> None:
  """Advantages of samples from the reference itself do not depend on its coefficient."""
  experience = samples.at_the_reference(samples.make_experience())
  none, much = (
    samples.collect(kind(kl=KLPenaltyConfig(coefficient=beta)), experience)[0]
    for beta in (0.0, 5.0)
  )
  np.testing.assert_array_equal(much.advantages, none.advantages)
  assert np.asarray(none.advantages).any()


@pytest.mark.parametrize('coefficient', [0.0, 5.0])
def test_the_penalty_of_grpo_has_no_gradient_yet(coefficient: float) -> None:
  """k3 and its derivative are 0: what is left is -A, and nothing where the group says nothing."""
  batch, outputs = make_batch('rollouts'), make_outputs('rollouts')
  batch = batch.replace(reference_logprobs=batch.old_logprobs)
  outputs['logprobs'] = batch.old_logprobs
  for config in (
    GRPOConfig(kl_coefficient=coefficient, loss_normalization='token'),
    ReinforcePPConfig(kl=KLPenaltyConfig(coefficient=coefficient), kl_in_loss=True),
  ):
    _, slopes = tabular.direct_loss(config, outputs, batch)
    expected = -batch.advantages / batch.sequences.response_mask.sum()
    np.testing.assert_allclose(slopes['logprobs'], expected, rtol=1e-5)
    silent = batch.replace(advantages=np.zeros_like(batch.advantages))
    loss, slopes = tabular.direct_loss(config, outputs, silent)
    assert loss == 0.0
    np.testing.assert_array_equal(slopes['logprobs'], 0.0)


ON_POLICY: dict[str, tuple[Any, bool]] = {
  # Whether the mean is over tokens; otherwise over responses.
  'ppo': (PPOConfig(value_coefficient=0.0), True),
  'rloo': (RLOOConfig(), False),
  'rloo token': (RLOOConfig(ratio='token'), True),
  'reinforce_pp': (ReinforcePPConfig(), True),
  'grpo token': (GRPOConfig(loss_normalization='token', kl_coefficient=0.0), True),
}


@pytest.mark.parametrize(('config', 'over_tokens'), ON_POLICY.values(), ids=ON_POLICY)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(config: Any, over_tokens: bool) -> None:
  """Up to what the mean is over: clipping and ratios begin to matter with the second update."""
  kind = 'valued_rollouts' if isinstance(config, PPOConfig) else 'rollouts'
  batch, outputs = make_batch(kind), make_outputs(kind)
  outputs['logprobs'] = batch.old_logprobs
  _, slopes = tabular.direct_loss(config, outputs, batch)
  _, expected = tabular.direct_loss(ReinforceConfig(), outputs, batch)
  tokens, rows = batch.sequences.response_mask.sum(), len(batch.advantages)
  factor = rows / tokens if over_tokens else 1.0
  np.testing.assert_allclose(slopes['logprobs'], expected['logprobs'] * factor, rtol=1e-5)
