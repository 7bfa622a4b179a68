"""Facts of PPO, through the real recipe."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.common import trees
from rlhf_jax.common.types import Sequences
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.evaluation.policy import decode_sequences
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.objectives.kl_penalty import KLPenaltyConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.recipes import Built
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.training.optimizer import OptimizerConfig
from rlhf_jax.training.writers import read_rows
from tests import tiny
from tests.models.logits import response_logits

pytestmark = pytest.mark.slow

EPOCHS, MINIBATCHES = 3, 2


class Steps(NamedTuple):
  """The first steps of a run.

  Attributes:
    built: the stage.
    prepared: what each step trained on.
    metrics: of each step.
    updates: what the optimizer's counters say after each step.
    state: after the last step.
    before: the initial parameters by name, on the host.
  """

  built: Built
  prepared: list[Any]
  metrics: list[dict[str, float]]
  updates: list[set[int]]
  state: Any
  before: dict[str, Any]


def ppo_config(parents: pathlib.Path, temperature: float = 1.0, **objective: Any) -> Any:
  settings: dict[str, Any] = {'epochs': EPOCHS, 'minibatches': MINIBATCHES}
  return tiny.make_config(
    'ppo',
    parents,
    steps=2,
    objective=PPOConfig(**{**settings, **objective}),
    rollout=RolloutConfig(exact_kl=True),
    generation=GenerationConfig(temperature=temperature),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    evaluation=EvaluationConfig(prompts=tiny.ROWS, records=0, batch_size=tiny.ROWS),
  )


def take_steps(config: Any, count: int = 2) -> Steps:
  built = tiny.build_recipe(config)
  prepared, metrics, updates = [], [], []
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    before = {name: np.array(leaf) for name, leaf in trees.flatten(state.params).items()}
    for step in range(count):
      ready = built.recipe.prepare(state, built.recipe.batch(step))
      prepared.append(ready)
      state, found = built.recipe.update(dataclasses.replace(state, carry=ready.carry), ready.batch)
      metrics.append(metrics_lib.values({**ready.metrics, **found}))
      counters = trees.flatten(state.opt_state).items()
      updates.append({int(x) for name, x in counters if name.endswith('count')})
  return Steps(built, prepared, metrics, updates, state, before)


@pytest.fixture(scope='module', params=[1.0, 0.7])
def steps(request: pytest.FixtureRequest, parents: pathlib.Path) -> tuple[float, Steps]:
  """Two steps at a temperature."""
  return request.param, take_steps(ppo_config(parents, request.param))


def test_the_policy_starts_at_its_reference(steps: tuple[float, Steps]) -> None:
  """Sampled and exact KL are 0 to 1e-6 at step 0, at any temperature, and not later."""
  metrics = steps[1].metrics
  for name in ('kl', 'kl_k3', 'exact_kl'):
    assert abs(metrics[0][name]) < 1e-6
  assert metrics[1]['exact_kl'] > 1e-3 and metrics[1]['kl_k3'] > 1e-4


def test_the_first_minibatch_is_on_policy(steps: tuple[float, Steps]) -> None:
  """Its ratios are 1; the sampler's log-probs are the teacher-forced ones; later ratios move."""
  metrics = steps[1].metrics
  for found in metrics:
    assert found['first_ratio_deviation'] < 1e-5
    assert found['sampler_logprob_error'] < 1e-5
    assert found['ratio_max'] > 1.001 and found['approximate_kl'] > 1e-7


def test_every_epoch_and_minibatch_is_run(steps: tuple[float, Steps]) -> None:
  """The optimizer counts epochs x minibatches updates a step, over every token in each epoch."""
  _, (built, prepared, _, updates, state, _) = steps
  assert updates == [{EPOCHS * MINIBATCHES}, {2 * EPOCHS * MINIBATCHES}]
  with jax.set_mesh(built.mesh):
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    _, metrics = built.recipe.update(copy, prepared[-1].batch)
  tokens = int(prepared[-1].batch.sequences.response_mask.sum())
  weights = {name: x.weight for name, x in metrics.items() if isinstance(x, metrics_lib.Mean)}
  assert float(weights['entropy']) == EPOCHS * tokens
  assert float(weights['gradient_norm']) == EPOCHS * MINIBATCHES


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_temperature_divides_every_logit(
  steps: tuple[float, Steps], parents: pathlib.Path
) -> None:
  """Old and reference log-probs are log softmax(logits / temperature) of policy and reference.

  Computed in NumPy from the logits at temperature 1; both differ from what temperature 1 gives.
  """
  temperature, (built, prepared, metrics, _, _, before) = steps
  rollouts = prepared[1].batch
  sequences, mask = rollouts.sequences, np.asarray(rollouts.sequences.response_mask)
  model: Any = built.model
  reference = trees.unflatten(
    built.recipe.abstract.params, {name: jax.numpy.asarray(x) for name, x in before.items()}
  )['policy']
  logits = np.asarray(response_logits(model, reference, sequences, temperature=1.0))
  tokens = np.asarray(sequences.response)[..., None]
  expected = np.take_along_axis(log_softmax(logits / temperature), tokens, -1)[..., 0]
  plain = np.take_along_axis(log_softmax(logits), tokens, -1)[..., 0]
  np.testing.assert_allclose(
    np.asarray(rollouts.reference_logprobs)[mask], expected[mask], atol=1e-5
  )
  # The first rollout was sampled from the very same parameters.
  first = prepared[0].batch
  np.testing.assert_array_equal(first.old_logprobs, first.reference_logprobs)
  difference = np.abs(np.asarray(rollouts.reference_logprobs) - plain)[mask].max()
  assert (difference > 0.1) == (temperature != 1.0)
  kl = np.where(mask, rollouts.old_logprobs - rollouts.reference_logprobs, 0).sum(-1).mean()
  assert metrics[1]['kl'] == pytest.approx(kl, abs=1e-6)


def test_evaluation_measures_at_the_same_temperature(steps: tuple[float, Steps]) -> None:
  """The unchanged policy's exact KL is 0; the trained one's is not. Answers are per prompt."""
  built, state = steps[1].built, steps[1].state
  with jax.set_mesh(built.mesh):
    start = built.recipe.evaluate(built.recipe.init().params, 0)
    later = built.recipe.evaluate(state.params, 2)
  assert abs(start.scalars['kl']) < 1e-6 < 1e-3 < later.scalars['kl']
  for name in ('gold_reward', 'proxy_reward', 'kl', 'win', 'length', 'prompt', 'response'):
    assert start.arrays[name].shape == (tiny.ROWS,)
  assert set(start.arrays['win']) <= {0.0, 0.5, 1.0}
  assert start.scalars['gold_reward'] == pytest.approx(start.arrays['gold_reward'].mean())


def test_rewards_are_the_task_s_to_the_last_digit(parents: pathlib.Path) -> None:
  """With gamma = lambda = 1, no penalty and a zero value head, every return is the gold reward.

  Nothing on the way truncates it to an integer, and it reaches every token of its own response.
  """
  config = ppo_config(
    parents,
    kl=KLPenaltyConfig(coefficient=0.0),
    lam=1.0,
    whiten_advantages=False,
    value_model='shared',
  )
  config.rollout = RolloutConfig(rewards=(RewardConfig(source='task'),))
  config.reward_model.init = None
  built: Any = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    prepared = built.recipe.prepare(state, built.recipe.batch(0))
  rollouts = prepared.batch
  texts = decode_sequences(jax.device_get(rollouts.sequences), built.tokenizer.decode)
  gold = tiny.feedback_of(config.data.response_length).task.gold_reward(*texts)
  mask = np.asarray(rollouts.sequences.response_mask)
  assert np.abs(gold - np.round(gold)).max() > 0.01
  for array in (rollouts.returns, rollouts.advantages):
    assert array.dtype == np.float32
    np.testing.assert_allclose(
      np.asarray(array), np.where(mask, gold[:, None], 0), atol=1e-6, rtol=1e-6
    )
  assert metrics_lib.values(prepared.metrics)['score'] == pytest.approx(gold.mean(), rel=1e-5)


@pytest.mark.parametrize('kind', ['separate', 'reward_model'])
def test_a_value_function_with_its_own_trunk(kind: str, parents: pathlib.Path) -> None:
  """It starts as a copy of the policy or of the reward model, is trained, and leaves both alone."""
  config = ppo_config(parents, value_model=kind, epochs=1, minibatches=1)
  steps = take_steps(config)
  trunk = {name: x for name, x in steps.before.items() if name.startswith('value_trunk.')}
  policy = {name: x for name, x in steps.before.items() if name.startswith('policy.')}
  same = all(
    np.array_equal(x, policy['policy' + name.removeprefix('value_trunk')])
    for name, x in trunk.items()
  )
  assert same == (kind == 'separate')
  head = steps.before['value_head.kernel']
  assert bool(head.any()) == (kind == 'reward_model')
  after = trees.flatten(steps.state.params)
  assert any(not np.array_equal(after[name], x) for name, x in trunk.items())
  # Two more rollouts are scored by the reward model that the value function started from.
  sequences: Sequences = steps.prepared[0].batch.sequences
  again = take_steps(config, count=1).prepared[0]
  np.testing.assert_array_equal(again.batch.sequences.response, sequences.response)
  np.testing.assert_array_equal(again.batch.returns, steps.prepared[0].batch.returns)


def test_the_adaptive_controller_reaches_its_target(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """From a coefficient far too small, the sequence KL settles within 10 % of the target."""
  target = 0.5
  config = tiny.make_config(
    'ppo',
    parents,
    steps=350,
    batch_size=32,
    objective=PPOConfig(epochs=1, kl=KLPenaltyConfig(coefficient=0.3, target=target, horizon=320)),
    rollout=RolloutConfig(rewards=(RewardConfig(source='task'),)),
    optimizer=OptimizerConfig(learning_rate=3e-3),
  )
  config.reward_model.init = None
  config.log.every = 50
  tiny.run_stage(config, tmp_path / 'run')
  rows = read_rows(tmp_path / 'run' / 'metrics.jsonl')
  assert rows[-1]['kl_coefficient'] > 1.5 * rows[0]['kl_coefficient']
  assert np.mean([row['kl'] for row in rows[3:]]) == pytest.approx(target, rel=0.1)
