"""A small made-up study, and a maker of single evaluations."""

import numpy as np
import pytest

from experiments.reporting.summary import Completion, Study, summarise
from rlhf_jax.evaluation import frontier

PROMPTS = 60
HOSTILE = '<script>alert("x")</script> & `a|b` **c**'


@pytest.fixture(scope='session')
def evaluation():
  """`evaluation('ppo', seed, step, gold=..., kl=...)`: metrics with the given means."""

  def make(objective, seed, step, *, gold=0.0, proxy=0.0, kl=0.0, win=0.5, length=10.0, spread=0.5):
    rng = np.random.default_rng([ord(objective[0]), seed, step])
    noise = rng.normal(size=(4, PROMPTS))
    noise -= noise.mean(1, keepdims=True)
    wins = np.zeros(PROMPTS)
    wins[: round(win * PROMPTS)] = 1.0
    return {
      'objective': objective,
      'seed': seed,
      'step': step,
      'tokens': 1000 * step,
      'seconds': 0.5 * step,
      'gold_reward': gold + spread * noise[0],
      'proxy_reward': proxy + spread * noise[1],
      'kl': kl + 0.2 * kl * noise[2],
      'win': rng.permutation(wins),
      'length': length + noise[3],
    }

  return make


@pytest.fixture(scope='session')
def optimum():
  """Rewards 0 or 4 with a half each: the frontier rises from 2 to 4 at KL log 2."""
  rewards = 4.0 * np.random.default_rng(0).integers(0, 2, size=(PROMPTS, 400))
  return frontier.optimal_frontier(rewards, replicates=200)


@pytest.fixture(scope='session')
def evaluations(evaluation):
  """SFT at gold 2, and two objectives of two seeds that gain reward under the optimum."""
  rows = [evaluation('sft', 0, 10, gold=2.0)]
  for objective, gain in (('ppo', 1.2), ('dpo', 0.8)):
    for seed in (0, 1):
      for step in (10, 20):
        kl = 0.0101 * step * (1 + 0.1 * seed)
        rows.append(
          evaluation(objective, seed, step, gold=2.0 + gain * step / 20, kl=kl, win=0.7, proxy=0.1)
        )
  return rows


@pytest.fixture(scope='session')
def study():
  return Study(
    title=f'Study {HOSTILE}',
    command='make quickstart  # ```',
    matched=[('Start', 'the same <b>SFT</b> parameters'), ('Preferences', '100 comparisons')],
    environment=[('jax', '0.10')],
    kl_budget=1.0,
  )


@pytest.fixture(scope='session')
def summary(evaluations, optimum, study):
  return summarise(
    evaluations,
    optimum=optimum,
    reward_model={'accuracy': 0.8, 'bayes_accuracy': 0.82},
    study=study,
    completions=[
      Completion(prompt=f'the film {HOSTILE}', objective='ppo', response=HOSTILE, gold_reward=3.0)
    ],
  )
