"""Objectives on single scored responses against published implementations: values, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import QOutput, Ratings
from rlhf_jax.models import q_heads
from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.objectives.ilql import ILQLConfig, ilql
from rlhf_jax.objectives.kto import KTOConfig, ReferencedRatings, prepare
from rlhf_jax.objectives.reward_rating import RatingRewardConfig
from rlhf_jax.ops.logprobs import token_logprobs
from tests.golden import golden
from tests.objectives import tabular
from tests.objectives.references import assert_close, assert_loss, ratings, sequences

KTO = ('beta_0.1', 'weighted', 'other_sign')


@pytest.mark.parametrize('reference', ['halos', 'trl'])
@pytest.mark.parametrize('case', KTO)
def test_kto(reference: str, case: str) -> None:
  """The authors' loss and TRL's, given their reference point."""
  found = golden.load('kto')
  inputs, fixture = found['inputs'], found['cases'][f'{reference}_{case}']
  batch = ReferencedRatings(
    ratings(inputs, np.where(inputs['desirable'], 1.0, -1.0)),
    jnp.full(len(inputs['mask']), fixture['outputs']['kl']),
  )
  config = KTOConfig(**fixture['hyperparameters'])
  assert_loss(config, batch, inputs, fixture, logprobs='policy_logprobs')


def test_kto_at_a_reference_point_of_zero() -> None:
  """TRL's APO-zero of unpaired responses."""
  found = golden.load('kto')
  inputs, fixture = found['inputs'], found['cases']['trl_apo_zero_unpaired']
  batch = ReferencedRatings(
    ratings(inputs, np.where(inputs['desirable'], 1.0, -1.0)), jnp.zeros(len(inputs['mask']))
  )
  config = KTOConfig(**fixture['hyperparameters'])
  assert_loss(config, batch, inputs, fixture, logprobs='policy_logprobs')


@pytest.mark.parametrize('reference', ['halos', 'trl'])
@pytest.mark.parametrize('case', KTO)
def test_the_reference_point_of_kto(reference: str, case: str) -> None:
  """The batch's mean log-ratio of mismatched responses, or 0 if it is below."""
  found = golden.load('kto')
  inputs, fixture = found['inputs'], found['cases'][f'{reference}_{case}']
  # `prepare` puts the responses of the rows that follow to the prompts.
  mask = np.roll(inputs['mismatched_mask'], 1, axis=0)
  batch = Ratings(sequences(mask), np.ones(len(mask), np.float32))
  names = ['mismatched_policy_logprobs', 'mismatched_ref_logprobs']
  if case == 'other_sign':
    names.reverse()
  policy, reference_params = ({'logprobs': inputs[name]} for name in names)
  actors = tabular.DIRECT._replace(
    policy=lambda params, rows: tabular.direct_policy(
      {**params, 'values': rows.response, 'entropy': rows.response}, rows
    )
  )
  prepared = prepare(KTOConfig(), actors, policy, reference_params, batch)
  assert_close(prepared.reference_point, np.full(len(mask), fixture['outputs']['kl']))


# (variant, clip, what is weighted by); 1e6 does not clip.
ALOL: dict[str, tuple[str, float, str]] = {
  'nll': ('reference_free', 0.9, 'ones'),
  'wbc': ('reference_free', 0.9, 'rewards'),
  'r_lol': ('sequence', 0.9, 'rewards'),
  'r_lol_kl': ('kl', 0.9, 'rewards'),
  'a_lol': ('sequence', 0.9, 'advantages'),
  'a_lol_unclipped': ('sequence', 1e6, 'advantages'),
  'a_lol_kl': ('kl', 0.9, 'advantages'),
  'a_lol_seq': ('token', 0.9, 'advantages'),
  'a_lol_seq_tight': ('token', 0.2, 'advantages'),
  'a_lol_seq_unclipped': ('token', 1e6, 'advantages'),
  'a_lol_ref_free': ('reference_free', 0.9, 'advantages'),
}


@pytest.mark.parametrize('case', ALOL)
def test_alol(case: str) -> None:
  """The authors' algorithms, and those of their baselines that differ in the weights alone.

  Rows without a positive advantage, which `curate` leaves out, have none in their loss either.
  """
  found = golden.load('alol')
  inputs = found['inputs']
  variant, clip, weights = ALOL[case]
  score = {
    'ones': np.ones(len(inputs['rewards'])),
    'rewards': inputs['rewards'],
    'advantages': np.maximum(inputs['rewards'] - inputs['state_values'], 0.0),
  }[weights]
  config = ALoLConfig(variant=variant, clip=clip, kl_coefficient=0.1)
  batch = ratings(inputs, score)
  assert_loss(config, batch, inputs, found['cases'][case], logprobs='policy_logprobs')


def q_output(inputs: dict[str, Any], leaves: dict[str, Any]) -> QOutput:
  """What models say whose logits, Q and V are given; V of the state after the last token is 0."""
  mask, actions = inputs['mask'], inputs['actions']
  following = np.pad(mask[:, 1:], ((0, 0), (0, 1)))

  def taken(q: Any) -> Any:
    index = np.broadcast_to(actions[..., None], (*q.shape[:-1], 1))
    return jnp.take_along_axis(q, index, axis=-1)[..., 0]

  return QOutput(
    logprobs=token_logprobs(leaves['logits'], actions),
    values=leaves['vs'][:, :-1],
    next_values=jnp.where(following, leaves['vs'][:, 1:], 0.0),
    q=taken(leaves['qs']),
    target_q=taken(inputs['target_qs']).min(0),
    q_nll=jnp.stack([-token_logprobs(q, actions) for q in leaves['qs']]),
  )


@pytest.mark.parametrize('case', ['trlx', 'trlx_weighted'])
def test_ilql(case: str) -> None:
  """trlx's four terms, their sum, and its gradient by logits, Q and V.

  The fixture has rewards at all tokens, so the terms are called rather than the loss.
  """
  found = golden.load('ilql')
  inputs, fixture = found['inputs'], found['cases'][case]
  settings, mask = fixture['hyperparameters'], inputs['mask']
  config = ILQLConfig(
    gamma=settings['gamma'],
    expectile=settings['tau'],
    cql_coefficient=settings['cql_scale'],
    awac_coefficient=settings['awac_scale'],
    awac_beta=settings['beta'],
  )

  def total(leaves: dict[str, Any]) -> Any:
    terms = ilql(config, q_output(inputs, leaves), inputs['rewards'], mask)
    means = {name: jnp.where(mask, x, 0.0).sum() / mask.sum() for name, x in terms.items()}
    weights = {'cql': config.cql_coefficient, 'awac': config.awac_coefficient}
    return sum(weights.get(name, 1.0) * x for name, x in means.items()), means

  leaves = {name: inputs[name] for name in ('logits', 'qs', 'vs')}
  (loss, means), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(leaves)
  assert_close(loss, fixture['outputs']['loss'])
  for name, mean in means.items():
    assert_close(mean, fixture['outputs'][f'loss_{name}'], name)
  for name, slope in slopes.items():
    assert_close(slope, fixture['gradients'][name], name)


@pytest.mark.parametrize(
  ('case', 'names'),
  [
    ('authors', ('v', 'q', 'cql')),
    ('authors_weighted', ('v', 'q')),
  ],
)
def test_the_values_of_ilql_are_its_authors(case: str, names: tuple[str, ...]) -> None:
  """The authors' losses of V, Q and, at temperature 1, of the conservative term.

  Their imitation term counts prompts in and may clip its weights; trlx's, and ours, does not.
  """
  found = golden.load('ilql')
  inputs, fixture = found['inputs'], found['cases'][case]
  mask, settings = inputs['mask'], fixture['hyperparameters']
  config = ILQLConfig(gamma=settings['gamma'], expectile=settings['tau'])
  terms = ilql(config, q_output(inputs, inputs), inputs['rewards'], mask)
  for name in names:
    assert_close(np.asarray(terms[name])[mask].mean(), fixture['outputs'][f'{name}_loss'], name)


@pytest.mark.parametrize('case', ['trlx_decode', 'authors_decode'])
def test_decoding_of_ilql(case: str) -> None:
  """Scores of the first token, before any filter, in trlx and in the authors' code."""
  found = golden.load('ilql')
  inputs, fixture = found['inputs'], found['cases'][case]
  logits, q, v = inputs['logits'][:, 0], inputs['target_qs'][:, :, 0].min(0), inputs['vs'][:, 0]
  beta = fixture['hyperparameters']['beta']
  ours = q_heads.tilt(jax.nn.log_softmax(logits), q, v, beta)
  assert_close(ours, fixture['outputs']['scores'])
  assert np.abs(ours - q_heads.tilt(jax.nn.log_softmax(logits), q, v, 0.0)).max() > 0.1


def test_scalar_ratings() -> None:
  """OpenAI's regression on ratings."""
  found = golden.load('openai')
  inputs, fixture = found['inputs'], found['cases']['scalar_rating']
  scores = inputs['reward_scores']
  batch = Ratings(sequences(np.ones((len(scores), 1), bool)), inputs['ratings'])
  loss, slopes = tabular.direct_loss(RatingRewardConfig(), {'scores': scores[:, 0]}, batch)
  assert_close(loss, fixture['outputs']['loss'])
  assert_close(slopes['scores'], fixture['gradients']['reward_scores'][:, 0])
