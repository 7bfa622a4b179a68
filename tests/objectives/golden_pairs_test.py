"""Objectives on comparisons and rankings against published implementations: values and gradients.

Where a reference has more than we do, or does otherwise, the test says what is compared.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common.types import Rankings, Ratings
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.orpo import ORPOConfig, orpo
from rlhf_jax.objectives.reward_listwise import ListwiseRewardConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.objectives.simpo import SimPOConfig
from rlhf_jax.objectives.unlikelihood import UnlikelihoodConfig
from tests.golden import golden
from tests.objectives import references, tabular
from tests.objectives.references import assert_close, assert_loss, pairs, sequences

DPO: dict[tuple[str, str], Any] = {
  ('dpo', 'sigmoid'): DPOConfig(beta=0.1),
  ('dpo', 'sigmoid_beta_0.5'): DPOConfig(beta=0.5),
  ('dpo', 'cdpo'): DPOConfig(beta=0.3, label_smoothing=0.1),
  ('dpo', 'ipo'): DPOConfig(beta=0.2, variant='ipo'),
  # Without a reference, DPO is contrastive preference learning without its bias.
  ('dpo', 'reference_free'): CPLConfig(alpha=0.3, lam=1.0),
  ('dpo_trl', 'sigmoid'): DPOConfig(beta=0.1),
  ('dpo_trl', 'hinge'): DPOConfig(beta=0.3, variant='hinge'),
  ('dpo_trl', 'ipo'): DPOConfig(beta=0.2, variant='ipo', reduction='mean'),
  ('dpo_trl', 'robust'): DPOConfig(beta=0.3, variant='robust', label_smoothing=0.1),
  ('dpo_trl', 'sigmoid_norm'): DPOConfig(beta=2.0, reduction='mean'),
}


@pytest.mark.parametrize(('fixture', 'case'), DPO)
def test_dpo(fixture: str, case: str) -> None:
  """The authors' code and TRL's."""
  found = golden.load(fixture)
  inputs = found['inputs']
  config = DPO[fixture, case]
  assert_loss(config, pairs(inputs), inputs, found['cases'][case], logprobs='policy_logprobs')


@pytest.mark.parametrize('case', ['sigmoid', 'cdpo', 'ipo'])
def test_implicit_rewards_of_dpo(case: str) -> None:
  """What the authors' code reports as rewards is what our metrics average."""
  found = golden.load('dpo')
  inputs, rewards = found['inputs'], found['cases'][case]['outputs']['implicit_rewards']
  outputs = {'logprobs': inputs['policy_logprobs']}
  _, metrics, _ = tabular.evaluator(DPO['dpo', case], tabular.DIRECT)(outputs, pairs(inputs))
  assert_close(metrics['chosen_implicit_reward'].value(), rewards[:, 0].mean())
  assert_close(metrics['rejected_implicit_reward'].value(), rewards[:, 1].mean())


@pytest.mark.parametrize('variant', ['sigmoid', 'ipo'])
def test_online_dpo(variant: str) -> None:
  """TRL's online DPO on the pairs that are told apart.

  Of equal rewards TRL calls the first preferred; our pair has no weight. All others weigh alike.
  """
  found = golden.load('dpo_trl')
  inputs, case = found['inputs'], found['cases'][f'online_{variant}']
  first, second = inputs['judge_rewards'].T

  def ordered(x: np.ndarray) -> np.ndarray:
    return np.where((first >= second).reshape((-1,) + (1,) * (x.ndim - 1)), x, x[:, ::-1])

  batch = jax.tree.map(lambda x: ordered(x) if x.ndim > 1 else x, pairs(inputs))
  batch = dataclasses.replace(batch, margin=abs(first - second))
  config = OnlineDPOConfig(beta=case['hyperparameters']['beta'], variant=variant)
  outputs = {'logprobs': ordered(inputs['policy_logprobs'])}
  loss, slopes = tabular.direct_loss(config, outputs, batch)
  apart = first != second
  assert 0 < apart.sum() < len(apart)
  assert_close(loss, case['outputs']['losses'][apart].mean())
  expected = np.where(apart[:, None, None], case['gradients']['policy_logprobs'], 0.0)
  assert_close(ordered(slopes['logprobs']), expected * len(apart) / apart.sum())


def test_sft() -> None:
  """TRL's loss of chosen responses, a mean over all tokens of the batch."""
  found = golden.load('dpo_trl')
  inputs, case = found['inputs'], found['cases']['sft']
  outputs = {'logprobs': inputs['policy_logprobs'][:, 0]}
  loss, slopes = tabular.direct_loss(SFTConfig(), outputs, sequences(inputs['mask'][:, 0]))
  assert_close(loss, case['outputs']['loss'])
  assert_close(slopes['logprobs'], case['gradients']['policy_logprobs'][:, 0])
  assert not case['gradients']['policy_logprobs'][:, 1].any()


CPL = ('cpl', 'cpl_bias_0.75', 'cpl_bias_1', 'cpl_kl')


@pytest.mark.parametrize('case', CPL)
def test_cpl(case: str) -> None:
  """The authors' code, with every bias, a tie and reversed labels."""
  found = golden.load('cpl')
  inputs, fixture = found['inputs'], found['cases'][case]
  settings = fixture['hyperparameters']
  config = CPLConfig(
    alpha=settings['alpha'], lam=settings['contrastive_bias'], use_reference=case == 'cpl_kl'
  )
  batch = pairs(inputs, inputs['preference'])
  assert_loss(config, batch, inputs, fixture, logprobs='policy_logprobs')


def test_cpl_imitating_all() -> None:
  """The authors' term is a mean over all positions of segments of one length, as ours is there."""
  found = golden.load('cpl')
  mask, fixture = found['inputs']['mask'], found['cases']['cpl_bc_all']
  whole = {
    **found['inputs'],
    'mask': np.ones_like(mask),
    'policy_logprobs': found['inputs']['policy_logprobs'] * mask,
  }
  config = CPLConfig(alpha=0.1, lam=0.5, bc_coefficient=0.5)
  outputs = {'logprobs': whole['policy_logprobs']}
  loss, slopes = tabular.direct_loss(config, outputs, pairs(whole, whole['preference']))
  assert_close(loss, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'] * mask, fixture['gradients']['policy_logprobs'])


def test_cpl_imitating_chosen() -> None:
  """The same of preferred segments alone, on the comparisons that are no ties.

  The authors count both segments of a tie in full, we count them half each.
  """
  found = golden.load('cpl')
  inputs, fixture = found['inputs'], found['cases']['cpl_bc_pos']
  labels = inputs['preference']
  totals = (inputs['policy_logprobs'] * inputs['mask']).astype(np.float64).mean(-1)
  imitated = np.concatenate([totals[labels >= 0.5, 0], totals[labels <= 0.5, 1]])
  assert_close(-imitated.mean(), fixture['outputs']['bc_loss'])
  whole = {'mask': np.ones_like(inputs['mask'])[labels != 0.5]}
  config = CPLConfig(alpha=0.1, lam=0.5, bc_coefficient=0.5, bc_responses='chosen')
  outputs = {'logprobs': (inputs['policy_logprobs'] * inputs['mask'])[labels != 0.5]}
  evaluate = tabular.evaluator(config, tabular.DIRECT)
  _, metrics, _ = evaluate(outputs, pairs(whole, labels[labels != 0.5]))
  ours = np.where(labels == 1.0, totals[:, 0], totals[:, 1])[labels != 0.5]
  assert_close(metrics['bc_nll'].value(), -ours.mean())


@pytest.mark.parametrize('case', ['dense', 'dense_bias_0.75', 'dense_bias_1', 'dense_kl'])
def test_dense_cpl(case: str) -> None:
  """All pairs of the authors' scored batch are those of one ranking, and of a batch of ratings."""
  found = golden.load('cpl')
  inputs, fixture = found['inputs'], found['cases'][case]
  settings = fixture['hyperparameters']
  config = DenseCPLConfig(
    alpha=settings['alpha'], lam=settings['contrastive_bias'], use_reference=case == 'dense_kl'
  )
  rank = 1 + (inputs['dense_scores'][:, None] < inputs['dense_scores']).sum(1)
  batch = Rankings(
    sequences(inputs['dense_mask'][None]),
    rank[None],
    np.ones((1, len(rank)), bool),
    inputs['dense_ref_logprobs'][None],
  )
  outputs = {'logprobs': inputs['dense_policy_logprobs'][None]}
  loss, slopes = tabular.direct_loss(config, outputs, batch)
  assert_close(loss, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'][0], fixture['gradients']['dense_policy_logprobs'])
  scored = ScoredCPLConfig(**vars(config))
  rows = Ratings(
    sequences(inputs['dense_mask']), inputs['dense_scores'], inputs['dense_ref_logprobs']
  )
  outputs = {'logprobs': inputs['dense_policy_logprobs']}
  loss, slopes = tabular.direct_loss(scored, outputs, rows)
  assert_close(loss, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'], fixture['gradients']['dense_policy_logprobs'])


# The authors' margin is in units of beta, TRL's is not.
SIMPO: dict[str, Any] = {
  'simpo': SimPOConfig(beta=2.0, gamma=0.5),
  'simpo_hinge': SimPOConfig(beta=2.5, gamma=2.5 * 0.55, variant='hinge'),
  'simpo_smoothed': SimPOConfig(beta=2.0, gamma=1.0, label_smoothing=0.1),
  'trl_simpo': SimPOConfig(beta=2.0, gamma=0.5),
}


@pytest.mark.parametrize('case', SIMPO)
def test_simpo(case: str) -> None:
  """The authors' trainer and TRL's."""
  found = golden.load('simpo')
  batch = pairs(found['inputs'])
  assert_loss(SIMPO[case], batch, found['inputs'], found['cases'][case], logprobs='policy_logprobs')


@pytest.mark.parametrize(
  ('case', 'config', 'weight'),
  [
    ('simpo_sft', SimPOConfig(beta=2.0, gamma=1.0), 0.3),
    ('trl_simpo_nll', SimPOConfig(beta=2.0, gamma=0.5), 1.0),
    ('trl_cpo', CPLConfig(alpha=0.1, lam=1.0), 1.0),
  ],
)
def test_simpo_and_cpo_with_a_likelihood_term(case: str, config: Any, weight: float) -> None:
  """The preference terms are ours (CPO's is CPL's without bias and reference).

  The references' likelihood is a mean over the chosen tokens of the batch, ours over those of each
  response, then over responses.
  """
  found = golden.load('simpo')
  inputs, fixture = found['inputs'], found['cases'][case]
  mask = inputs['mask'][:, 0]
  nll = -inputs['policy_logprobs'][:, 0][mask].astype(np.float64).mean()
  slope = np.zeros(inputs['mask'].shape)
  slope[:, 0] = np.where(mask, -1 / mask.sum(), 0.0)
  outputs = {'logprobs': inputs['policy_logprobs']}
  loss, slopes = tabular.direct_loss(config, outputs, pairs(inputs))
  assert_close(loss + weight * nll, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'] + weight * slope, fixture['gradients']['policy_logprobs'])


@pytest.mark.parametrize('lam', [0.1, 1.0])
def test_orpo(lam: float) -> None:
  """The authors' loss of responses of one length, without the likelihood of the prompt.

  (With other lengths it averages a padding token in; it can also imitate prompts.)
  """
  found = golden.load('orpo')
  inputs = found['inputs']
  batch = pairs({'mask': np.ones_like(inputs['mask'])})
  case = found['cases'][f'full_authors_beta_{lam:g}_response_nll']
  assert_loss(ORPOConfig(lam=lam), batch, inputs, case, logprobs='policy_logprobs')


@pytest.mark.parametrize('lam', [0.1, 1.0])
def test_the_odds_of_orpo(lam: float) -> None:
  """TRL's odds ratio of ragged responses, as loss and gradient; its likelihood is of prompts too.

  TRL rounds the ratio to float32.
  """
  found = golden.load('orpo')
  inputs, fixture = found['inputs'], found['cases'][f'trl_beta_{lam:g}']
  mask, logprobs = inputs['mask'], inputs['policy_logprobs']

  def odds_loss(logprobs: Any) -> Any:
    means = jax.numpy.where(mask, logprobs, 0.0).sum(-1) / mask.sum(-1)
    return lam * orpo(means, jax.numpy.ones(len(mask))).mean()

  loss, slope = jax.jit(jax.value_and_grad(odds_loss))(logprobs)
  assert_close(loss, fixture['outputs']['loss'] - fixture['outputs']['nll'])
  tokens = mask[:, 0].sum() + inputs['prompt_logprobs'][:, 0].size
  imitated = np.zeros(mask.shape)
  imitated[:, 0] = np.where(mask[:, 0], -1 / tokens, 0.0)
  assert_close(slope + imitated, fixture['gradients']['policy_logprobs'])


def test_token_unlikelihood() -> None:
  """The term for rejected tokens is that of the authors' loss of repeated n-grams.

  A sum over tokens, which we divide by responses and they by tokens. The chosen responses are
  single tokens that are certain already.
  """
  found = golden.load('unlikelihood')
  inputs, fixture = found['inputs'], found['cases']['sequence']
  mask = inputs['mask']
  certain = np.zeros_like(mask)
  certain[:, 0] = True
  batch = pairs({'mask': np.stack([certain, mask], 1)})
  logprobs = np.stack([np.zeros_like(inputs['policy_logprobs']), inputs['policy_logprobs']], 1)
  config = UnlikelihoodConfig(variant='token', alpha=1.0)
  loss, slopes = tabular.direct_loss(config, {'logprobs': logprobs}, batch)
  factor = len(mask) / fixture['outputs']['total'] * fixture['outputs']['loss']
  assert_close(loss * factor, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'][:, 1] * factor, fixture['gradients']['policy_logprobs'])


def test_best_of_four() -> None:
  """OpenAI's loss of best-of-four labels: the best has rank 1, the others are equal."""
  found = golden.load('openai')
  scores, best = found['inputs']['reward_scores'], found['inputs']['best']
  rows, responses = scores.shape
  rank = np.where(np.arange(responses) == best[:, None], 1, 2)
  batch = Rankings(
    references.sequences(np.ones((rows, responses, 1), bool)), rank, np.ones(rank.shape, bool)
  )
  case = found['cases']['best_of_4']
  assert_loss(ListwiseRewardConfig(), batch, found['inputs'], case, scores='reward_scores')
