"""Objectives that learn from their own samples against published implementations.

From samples and scores through `collect` to the loss: advantages, values and gradients.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import OBJECTIVES, ObjectiveConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig, next_coefficient
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from tests.golden import golden
from tests.objectives import tabular
from tests.objectives.references import assert_close, assert_loss, collected, experience

GROUP = 4


def assert_case(
  fixture: str, case: str, config: ObjectiveConfig, scores: Any = None, *, values: bool = False
) -> None:
  """Advantages, loss and gradients are those of a case; `scores` if not those of its inputs."""
  config.validate('objective')
  found = golden.load(fixture)
  inputs, expected = found['inputs'], found['cases'][case]
  samples = experience(inputs, scores)
  if expected['hyperparameters'].get('on_policy'):
    samples = samples.replace(old_logprobs=np.where(inputs['mask'], inputs['logprobs'], 0.0))
  batch = collected(config, samples)
  advantages = expected['outputs'].get('advantages')
  if advantages is not None:
    # Some references give one a response, some leave those behind the end as they are.
    advantages = advantages.reshape(len(advantages), -1) * inputs['mask']
    assert_close(batch.advantages, advantages, 'advantages')
  names = {'logprobs': 'logprobs', **({'values': 'values'} if values else {})}
  assert_loss(config, batch, inputs, expected, **names)


def ppo_config(settings: dict[str, Any], **options: Any) -> PPOConfig:
  """The settings that all PPO fixtures have."""
  return PPOConfig(
    gamma=settings['gamma'],
    lam=settings['lam'],
    clip=settings['cliprange'],
    value_clip=settings['cliprange_value'],
    kl=KLPenaltyConfig(coefficient=settings['kl_coef']),
    whiten_rewards=settings['whiten_rewards'],
    **options,
  )


@pytest.mark.parametrize(
  'case', ['nplus', 'nplus_whitened', 'nplus_discounted', 'trl', 'trl_whitened']
)
def test_ppo_with_scores_after_the_stop(case: str) -> None:
  """The code of Huang et al. 2024, and TRL's, which whitens with the unbiased variance."""
  found = golden.load('ppo')
  settings, outputs = (found['cases'][case][x] for x in ('hyperparameters', 'outputs'))
  config = ppo_config(
    settings,
    value_coefficient=settings['vf_coef'],
    value_normalization='own',
    score_placement='after_stop',
    unbiased_variance=case.startswith('trl'),
  )
  assert_case('ppo', case, config, values=True)
  batch = collected(config, experience(found['inputs']))
  np.testing.assert_array_equal(batch.value_mask, outputs['mask_p1'])
  assert_close(batch.returns, np.where(outputs['mask_p1'], outputs['returns'], 0.0))


@pytest.mark.parametrize('case', ['ppo', 'ppo_plain_rewards'])
def test_ppo_with_responses_of_one_length(case: str) -> None:
  """OpenAI's first code."""
  settings = golden.load('openai')['cases'][case]['hyperparameters']
  config = ppo_config(
    settings, value_coefficient=settings['vf_coef'], score_placement='last_position'
  )
  assert_case('openai', case, config, values=True)
  found = golden.load('openai')
  inputs, outputs = found['inputs'], found['cases'][case]['outputs']
  params = {name: inputs[name] for name in ('logprobs', 'values')}
  batch = collected(config, experience(inputs))
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(params, batch)
  reported = {
    'policy_loss': 'loss_policy', 'value_loss': 'loss_value', 'approximate_kl': 'policy_approxkl'
  }  # fmt: skip
  for ours, theirs in reported.items():
    assert_close(metrics[ours].value(), outputs[theirs], ours)
  assert_close(np.asarray(batch.returns).mean(), outputs['returns_mean'])


def test_ppo_with_scores_at_the_last_token() -> None:
  """OpenRLHF's; its value loss has the policy loss's mask and its own weight."""
  config = PPOConfig(gamma=0.95, kl=KLPenaltyConfig(coefficient=0.05), value_coefficient=1.0)
  assert_case('reinforce_pp', 'gae', config, values=True)


def test_the_kl_controller() -> None:
  """OpenAI's, through six iterations, errors beyond both clips among them."""
  found = golden.load('openai')
  case = found['cases']['adaptive_kl']
  settings = case['hyperparameters']
  config = KLPenaltyConfig(
    coefficient=settings['kl_coef'], target=settings['target'], horizon=settings['horizon']
  )
  coefficient = jnp.float32(settings['kl_coef'])
  for kl, expected in zip(found['inputs']['kls'], case['outputs']['coefficients'], strict=True):
    coefficient = next_coefficient(config, coefficient, jnp.full(settings['batch_size'], kl))
    assert_close(coefficient, expected)


@pytest.mark.parametrize('case', ['trl', 'trl_no_kl', 'trl_normalized', 'trl0', 'trl0_token_kl'])
def test_rloo(case: str) -> None:
  """TRL's, of today and of 0.15, whose KL per token adds up to the same.

  Clipping rewards is the scoring's part.
  """
  found = golden.load('rloo')
  settings = found['cases'][case]['hyperparameters']
  clip = settings['reward_clip_range'] if case == 'trl_normalized' else [-10.0, 10.0]
  config = RLOOConfig(
    samples=GROUP,
    kl=KLPenaltyConfig(coefficient=settings.get('beta', settings.get('kl_coef'))),
    whiten_advantages=case == 'trl_normalized',
  )
  assert_case('rloo', case, config, np.clip(found['inputs']['scores'], *clip))


PLUS_PLUS: dict[str, dict[str, Any]] = {
  'reinforce_pp': {},
  'reinforce_pp_discounted': {'gamma': 0.9, 'kl': KLPenaltyConfig(coefficient=0.2)},
  'reinforce_pp_baseline': {'group_baseline': True},
  'reinforce_pp_kl_loss': {'group_baseline': True, 'kl_in_loss': True},
  'reinforce_pp_no_std': {'scale': False},
  'sample_level': {'loss_normalization': 'sequence'},
  'dual_clip': {'dual_clip': 1.5},
}


@pytest.mark.parametrize('case', PLUS_PLUS)
def test_reinforce_pp(case: str) -> None:
  """OpenRLHF's REINFORCE++ and REINFORCE++-baseline; clipping rewards is the scoring's part."""
  found = golden.load('reinforce_pp')
  clip = found['cases'][case]['hyperparameters']['reward_clip_range'] or [-np.inf, np.inf]
  options = {'samples': GROUP, 'kl': KLPenaltyConfig(coefficient=0.05), **PLUS_PLUS[case]}
  config = ReinforcePPConfig(**options)
  assert_case('reinforce_pp', case, config, np.clip(found['inputs']['scores'], *clip))


NORMALIZATION = {
  'grpo': 'sequence',
  'bnpo': 'token',
  'dapo': 'token',
  'dr_grpo': 'constant',
  'luspo': 'constant',
}
GRPO = (
  'grpo',
  'grpo_kl',
  'grpo_on_policy',
  'grpo_scale_batch',
  'grpo_scale_none',
  'grpo_two_sided',
  'bnpo',
  'dr_grpo',
  'dapo',
  'dapo_kl',
  'gspo',
  'luspo',
)


@pytest.mark.parametrize('case', GRPO)
def test_grpo(case: str) -> None:
  """TRL's losses of the names; its batch is one optimizer step. LUSPO divides sums by nothing."""
  settings = golden.load('grpo')['cases'][case]['hyperparameters']
  normalization = NORMALIZATION[settings['loss_type']]
  divisors = {'dr_grpo': settings['max_completion_length'], 'luspo': 1.0}
  config = GRPOConfig(
    samples=GROUP,
    clip=settings['epsilon_low'],
    clip_high=settings['epsilon_high'],
    dual_clip=settings['delta'] or 0.0,
    kl_coefficient=settings['beta'],
    ratio=settings['importance_sampling_level'],
    scale=settings['scale_rewards'],
    loss_normalization=normalization,
    constant=divisors.get(settings['loss_type'], 0.0),
  )
  assert_case('grpo', case, config)


OPENRLHF: dict[str, dict[str, Any]] = {
  'group_norm': {'kl_coefficient': 0.05},
  'dr_grpo': {'kl_coefficient': 0.05, 'scale': 'none'},
}


@pytest.mark.parametrize('case', OPENRLHF)
def test_grpo_over_tokens(case: str) -> None:
  """OpenRLHF's, which averages over tokens and divides by the deviation plus 1e-9."""
  config = GRPOConfig(samples=GROUP, loss_normalization='token', epsilon=1e-9, **OPENRLHF[case])
  assert_case('reinforce_pp', case, config)


def test_these_start_from_the_coefficient_of_their_config() -> None:
  """What `collected` above takes for the first iteration's."""
  config = RLOOConfig(kl=KLPenaltyConfig(coefficient=0.7))
  assert OBJECTIVES['rloo'].carry(config) == {'kl_coefficient': 0.7}
