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
from rlhf_jax.objectives.orpo import ORPOConfig
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


def test_dpo_with_imitation() -> None:
  """TRL adds up losses: here `loss_type=['sigmoid', 'sft']` with weights 1 and 0.5."""
  found = golden.load('dpo_trl')
  inputs, cases = found['inputs'], found['cases']
  both = {
    kind: {
      name: cases['sigmoid'][kind][name] + 0.5 * cases['sft'][kind][name]
      for name in cases['sft'][kind]
    }
    for kind in ('outputs', 'gradients')
  }
  config = DPOConfig(beta=0.1, nll_coefficient=0.5, nll_normalization='token')
  assert_loss(config, pairs(inputs), inputs, both, logprobs='policy_logprobs')


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


IMITATING = {
  'all': ('cpl_bc_all', CPLConfig(bc_coefficient=0.5)),
  'all, by token': ('cpl_bc_all', CPLConfig(bc_coefficient=0.5, bc_normalization='token')),
  'chosen': (
    'cpl_bc_pos',
    CPLConfig(bc_coefficient=0.5, bc_responses='chosen', bc_normalization='token'),
  ),
}


@pytest.mark.parametrize(('case', 'config'), IMITATING.values(), ids=IMITATING)
def test_cpl_with_imitation(case: str, config: CPLConfig) -> None:
  """The authors' term, of segments of one length: of all, or of preferred ones and ties in full."""
  found = golden.load('cpl')
  mask, fixture = found['inputs']['mask'], found['cases'][case]
  assert {0.0, 0.5, 1.0} <= set(found['inputs']['preference'])
  whole = {'mask': np.ones_like(mask)}
  outputs = {'logprobs': found['inputs']['policy_logprobs'] * mask}
  batch = tabular.prepared(config, pairs(whole, found['inputs']['preference']))
  loss, slopes = tabular.direct_loss(config, outputs, batch)
  assert_close(loss, fixture['outputs']['loss'])
  assert_close(slopes['logprobs'] * mask, fixture['gradients']['policy_logprobs'])
  _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
  assert_close(metrics['bc_nll'].value(), fixture['outputs']['bc_loss'])


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
  'simpo_sft': SimPOConfig(beta=2.0, nll_coefficient=0.3, nll_normalization='token'),
  'trl_simpo_nll': SimPOConfig(gamma=0.5, nll_coefficient=1.0, nll_normalization='token'),
  # CPO's preference term is CPL's without bias and reference.
  'trl_cpo': CPLConfig(
    alpha=0.1, lam=1.0, bc_coefficient=1.0, bc_responses='chosen', bc_normalization='token'
  ),
}


@pytest.mark.parametrize('case', SIMPO)
def test_simpo(case: str) -> None:
  """The authors' trainer, TRL's SimPO and its CPO; the latter two imitate unless told not to."""
  found = golden.load('simpo')
  batch = pairs(found['inputs'])
  assert_loss(SIMPO[case], batch, found['inputs'], found['cases'][case], logprobs='policy_logprobs')


ORPO = {
  'trl_beta': (ORPOConfig(nll_normalization='token', prompt_nll=True), False),
  'full_authors_beta': (ORPOConfig(nll_normalization='token', prompt_nll=True), True),
  'full_authors_beta response_nll': (ORPOConfig(nll_normalization='token'), True),
  # Of responses of one length, both normalizations are the same.
  'full_authors_beta response_nll by response': (ORPOConfig(), True),
}


@pytest.mark.parametrize('lam', [0.1, 1.0])
@pytest.mark.parametrize('name', ORPO)
def test_orpo(name: str, lam: float) -> None:
  """TRL's whole loss, and the authors' of responses of one length, with and without the prompts'.

  (Of other lengths the authors average a padding token in.)
  """
  found = golden.load('orpo')
  config, full = ORPO[name]
  config = dataclasses.replace(config, lam=lam)
  case, _, suffix = name.partition(' ')
  suffix = suffix.removesuffix(' by response')
  fixture = found['cases'][f'{case}_{lam:g}' + f'_{suffix}' * bool(suffix)]
  names = ('prompt_logprobs', 'policy_logprobs') if config.prompt_nll else ('policy_logprobs',)
  inputs = found['inputs']
  rows = pairs({'mask': np.ones_like(inputs['mask'])} if full else inputs)
  # Three tokens; the first is not imitated.
  prompt = np.ones((*inputs['mask'].shape[:2], 1 + inputs['prompt_logprobs'].shape[-1]), bool)
  texts = dataclasses.replace(rows.sequences, prompt=prompt.astype(np.int32), prompt_mask=prompt)
  batch = tabular.prepared(config, dataclasses.replace(rows, sequences=texts))
  outputs = {'logprobs': np.concatenate([inputs[name] for name in names], axis=-1)}
  loss, slopes = tabular.direct_loss(config, outputs, batch)
  assert_close(loss, fixture['outputs']['loss'])
  expected = np.concatenate([fixture['gradients'][name] for name in names], axis=-1)
  assert_close(slopes['logprobs'], expected)
  if 'nll' in fixture['outputs']:
    _, metrics, _ = tabular.evaluator(config, tabular.DIRECT)(outputs, batch)
    assert_close(metrics['chosen_nll'].value(), fixture['outputs']['nll'])


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
