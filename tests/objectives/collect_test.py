"""Properties of what objectives make of their samples, in every variant."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common.types import Pairs, Rollouts, Sequences
from rlhf_jax.objectives import OBJECTIVES, demands_of, objective_of
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from tests.objectives import batches
from tests.objectives.samples import collect, make_experience

STEERED = KLPenaltyConfig(coefficient=0.3, target=0.2, horizon=50)
CASES: dict[str, Any] = {
  'ppo': PPOConfig(kl=STEERED, gamma=0.9),
  'ppo after the stop': PPOConfig(
    kl=STEERED, score_placement='after_stop', whiten_rewards=True, unbiased_variance=True
  ),
  'rloo': RLOOConfig(samples=2, kl=STEERED),
  'rloo whitened': RLOOConfig(samples=2, kl=STEERED, whiten_advantages=True),
  'reinforce': ReinforceConfig(kl=STEERED),
  'reinforce batch': ReinforceConfig(kl=STEERED, baseline='batch'),
  'reinforce none': ReinforceConfig(kl=STEERED, baseline='none'),
  'reinforce_pp': ReinforcePPConfig(kl=STEERED, gamma=0.9),
  'reinforce_pp baseline': ReinforcePPConfig(kl=STEERED, samples=2, group_baseline=True),
  'reinforce_pp plain': ReinforcePPConfig(kl=STEERED, scale=False),
  'grpo': GRPOConfig(samples=2),
  'grpo batch': GRPOConfig(samples=2, scale='batch'),
  'grpo none': GRPOConfig(samples=2, scale='none'),
  'online_dpo': OnlineDPOConfig(),
  'best_of_n': BestOfNConfig(samples=2),
  'tilted_bc': TiltedBCConfig(samples=2),
}
# What is made of a prompt's responses by comparing them with each other.
# (The deviation of a whole batch of scores is one between prompts too.)
COMPARING = [
  name
  for name, config in CASES.items()
  if getattr(config, 'samples', 1) > 1 and name != 'grpo batch'
]
every_case = pytest.mark.parametrize('case', CASES)


def experience_of(case: str, bad: float = 0.0) -> Any:
  """Samples with rewards paid token by token, where the objective places them."""
  experience = make_experience(bad)
  if case.startswith(('ppo', 'reinforce_pp')):
    paid = np.random.default_rng(7).normal(0, 1, experience.values.shape).astype(np.float32)
    mask = experience.sequences.response_mask
    experience = experience.replace(token_rewards=np.where(mask, paid, np.float32(bad)))
  return experience


def learnt_from(batch: Any) -> Any:
  """What the loss reads of a batch, with 0 wherever it reads nothing."""
  if isinstance(batch, Rollouts):
    valued = batch.value_mask is not None
    read: dict[str, Any] = {'advantages': batch.advantages}
    if valued:
      read |= {'returns': batch.returns, 'value_mask': batch.value_mask}
    return read
  rows = batch if isinstance(batch, Sequences) else batch.sequences
  read = {'response': np.where(rows.response_mask, rows.response, 0), 'mask': rows.response_mask}
  if isinstance(batch, Pairs):
    read |= {'preference': batch.preference, 'margin': batch.margin}
  return read


def assert_same(first: Any, second: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
  """Equal trees, to the bit unless a tolerance is given."""
  assert str(jax.tree.structure(first)) == str(jax.tree.structure(second))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), first, second)


def test_every_sampling_objective_has_a_case() -> None:
  """An objective that collects must be added here."""
  collecting = {name for name, row in OBJECTIVES.items() if row.collect is not None}
  assert {objective_of(config).name for config in CASES.values()} == collecting


@every_case
@pytest.mark.parametrize('bad', [np.nan, np.inf, -1e30])
def test_what_is_said_of_padding_does_not_matter(case: str, bad: float) -> None:
  """Advantages, returns, memory and metrics are bit for bit those without garbage."""
  clean, dirty = (collect(CASES[case], experience_of(case, x)) for x in (0.0, bad))
  assert_same((learnt_from(dirty[0]), *dirty[1:]), (learnt_from(clean[0]), *clean[1:]))


@every_case
def test_more_padding_changes_nothing(case: str) -> None:
  """Three more columns behind every response; a score after the stop finds its place."""
  experience = experience_of(case)
  mask = experience.sequences.response_mask
  # No response fills its row: after the stop there is room already.
  experience = experience.replace(
    sequences=dataclasses.replace(
      experience.sequences, response_mask=mask & (np.arange(mask.shape[1]) < 3)
    )
  )
  names = ('old_logprobs', 'reference_logprobs', 'values', 'token_rewards')
  wider = {
    name: np.pad(getattr(experience, name), ((0, 0), (0, 3)), constant_values=9.0)
    for name in names
    if getattr(experience, name) is not None
  }
  wide = experience.replace(sequences=batches.pad(experience.sequences, 2, 3), **wider)
  narrow_found, wide_found = (collect(CASES[case], x) for x in (experience, wide))
  cut = {
    name: x[..., : mask.shape[1]] if np.ndim(x) > 1 else x
    for name, x in learnt_from(wide_found[0]).items()
  }
  assert_same(cut, learnt_from(narrow_found[0]), rtol=1e-5, atol=1e-6)
  assert_same(wide_found[1:], narrow_found[1:], rtol=1e-5, atol=1e-6)


@every_case
def test_the_order_of_prompts_does_not_matter(case: str) -> None:
  """Exchanging two prompts, with all of their responses, exchanges what is made of them."""
  experience = experience_of(case)
  straight = collect(CASES[case], experience)
  turned = collect(CASES[case], jax.tree.map(lambda x: x[[2, 3, 0, 1]], experience))
  half = len(jax.tree.leaves(straight[0])[0]) // 2
  back = jax.tree.map(lambda x: np.roll(x, half, axis=0), learnt_from(turned[0]))
  assert_same(back, learnt_from(straight[0]), rtol=1e-5, atol=1e-6)
  assert_same(turned[1:], straight[1:], rtol=1e-5, atol=1e-6)


@every_case
def test_rows_of_a_prompt_stay_adjacent(case: str) -> None:
  """As many as `demands` say: so that updates can read it once."""
  experience = experience_of(case)
  samples = demands_of(CASES[case]).samples
  rows = experience.sequences
  number = np.arange(len(rows.prompt)) // samples
  numbered = dataclasses.replace(rows, prompt=np.broadcast_to(number[:, None], rows.prompt.shape))
  batch = collect(CASES[case], experience.replace(sequences=numbered))[0]
  found = getattr(batch, 'sequences', batch).prompt
  expected = np.repeat(np.unique(number), demands_of(CASES[case]).rows)
  np.testing.assert_array_equal(found.reshape(len(expected), -1)[:, 0], expected)


@pytest.mark.parametrize('case', COMPARING)
def test_what_all_responses_to_a_prompt_are_paid_does_not_matter(case: str) -> None:
  """A bonus for one prompt's responses, all alike, is no reason to prefer any of them."""
  experience = experience_of(case).replace(token_rewards=None)
  bonus = np.array([2.0, 2.0, 0.0, 0.0], np.float32)
  plain, paid = (
    learnt_from(collect(CASES[case], x)[0])
    for x in (experience, experience.replace(scores=experience.scores + bonus))
  )
  assert_same(paid, plain, rtol=1e-5, atol=1e-5)
