"""Wires a stage's models and data to the questions that evaluations ask."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.common import prng
from rlhf_jax.common.errors import DataError
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.processes import to_host
from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.data import pipeline
from rlhf_jax.evaluation.best_of_n import best_of_n, best_of_n_kl
from rlhf_jax.evaluation.policy import (
  Answers,
  PolicyProbes,
  answer_prompts,
  decode_sequences,
  wins,
)
from rlhf_jax.evaluation.preferences import log_losses, preference_scores, verdicts_right
from rlhf_jax.objectives import Actors, objective_of
from rlhf_jax.recipes.parts import Parts, StageParts
from rlhf_jax.recipes.policies import Roles, make_kl, make_sampler
from rlhf_jax.recipes.rewards import FrozenRewardModel, make_reward, make_score
from rlhf_jax.rollout.config import RewardConfig
from rlhf_jax.rollout.shaping import handle_missing_stop, truncate_for_scoring
from rlhf_jax.sharding.mesh import put_batch
from rlhf_jax.training.recipe import Evaluation

Array = jax.Array
# (params by role, step) -> answers
Question = Callable[[Any, int], Evaluation]

# The baseline answers the same prompts with random numbers of its own: were they the policy's, an
# unchanged policy would tie with it everywhere.
_POLICY, _BASELINE, _FRONTIER, _BEST_OF_N = 0, 1, 2, 3
# Many samples are cheaper in large batches.
_FRONTIER_BATCHES = 16


def ask(questions: Sequence[Question], params: Any, step: int) -> Evaluation:
  """All the answers, merged."""
  scalars: dict[str, float] = {}
  arrays: dict[str, np.ndarray] = {}
  for question in questions:
    answer = question(params, step)
    scalars.update(answer.scalars)
    arrays.update(answer.arrays)
  return Evaluation(scalars, arrays)


def prompt_columns(parts: Parts, split: str, count: int | None) -> pipeline.Columns:
  """The first prompts of a split, encoded."""
  prompts = parts.feedback.require(split, 'prompts')[:count]
  return pipeline.encode_prompts(prompts, parts.tokenizer, parts.config.data)


def device_batches(
  parts: StageParts, columns: pipeline.Columns, batch_size: int | None = None
) -> Iterator[tuple[Any, np.ndarray]]:
  """Every row once, on the mesh; `[B]` bool says which rows are not filling."""
  size = parts.config.evaluation.batch_size if batch_size is None else batch_size
  for batch, real in pipeline.sequential(columns, size):
    yield put_batch(batch, parts.mesh), real


def pays_something_else(parts: Parts, reward_model: FrozenRewardModel | None) -> bool:
  """Whether responses are paid something that nobody else is asked for, and all judges are there.

  Proxy and gold reward are measured anyway: what the reward model or the task says, as it is.
  (A checkpoint folder is asked the questions of a config without the stages that this starts from.)
  """
  rollout = parts.config.rollout
  uncut = rollout.missing_stop == 'none' and rollout.score_truncation_token < 0
  if objective_of(parts.config.objective).data != 'prompts':
    return False
  if uncut and rollout.rewards in ((RewardConfig(),), (RewardConfig(source='task'),)):
    return False
  shared = sum(term.source == 'reward_model' and term.init is None for term in rollout.rewards)
  return shared <= (reward_model is not None)


def make_paid(parts: Parts, reward_model: FrozenRewardModel | None) -> Callable[[Answers], Array]:
  """What the objective pays for answers, as rollouts score them; without penalties for KL."""
  rollout = parts.config.rollout
  strict = parts.config.health.nonfinite == 'stop'
  reward = make_reward(parts, reward_model, strict=strict)

  def paid(answers: Answers) -> Array:
    scored = truncate_for_scoring(answers.sequences, answers.finished, rollout)
    return handle_missing_stop(reward(scored.sequences)().scores, scored.stopped, rollout)

  return paid


def policy_probes(
  parts: Parts, reference: Roles | None, reward_model: FrozenRewardModel | None
) -> PolicyProbes:
  """What can be measured of this stage's policy."""
  sampler, kl_of = make_sampler(parts), make_kl(parts)

  @jax.jit
  def answer(params: Any, prompts: Prompts, key: Array) -> Answers:
    sequences, samples = sampler(params, prompts, key)
    return Answers(sequences, samples.finished)

  def kl(params: Roles, rows: Sequences) -> Array:
    assert reference is not None
    return kl_of(params, reference, rows)

  task = parts.feedback.task
  score = None if reward_model is None else make_score(reward_model)
  paid = pays_something_else(parts, reward_model)
  return PolicyProbes(
    generate=answer,
    kl=None if reference is None else kl,
    proxy=None if score is None else lambda rows: score(rows).scores,
    reward=make_paid(parts, reward_model) if paid else None,
    gold=None if task is None else task.gold_reward,
    decode=parts.tokenizer.decode,
  )


def policy_question(parts: Parts, reward_model: FrozenRewardModel | None) -> Question | None:
  """What does the policy answer to held-out prompts? None when no prompts are asked for."""
  config = parts.config
  if not config.evaluation.prompts:
    return None
  columns = prompt_columns(parts, 'held_out', config.evaluation.prompts)
  reference = None if parts.reference is None else {'policy': parts.reference}
  probes = policy_probes(parts, reference, reward_model)
  key = prng.base_key(config.evaluation.seed)

  def answers(params: Any, who: int) -> dict[str, np.ndarray]:
    batches = device_batches(parts, columns)
    return answer_prompts(
      probes, params, prng.stream_key(key, prng.Stream.EVALUATION, who), batches
    )

  baseline: dict[str, np.ndarray] = {}

  def question(params: Any, step: int) -> Evaluation:
    del step
    arrays = answers(params, _POLICY)
    if reference is not None:
      if not baseline:
        baseline.update(answers(reference, _BASELINE))
      win = wins(arrays, baseline)
      if win is not None:
        arrays['win'] = win
    numbers = {
      'win_rate' if name == 'win' else name: float(np.mean(values))
      for name, values in arrays.items()
      if values.dtype.kind in 'fiub'
    }
    return Evaluation(numbers, arrays)

  return question


def make_differences(parts: StageParts, actors: Actors) -> Callable[[Any, Any], Array]:
  """`(params, comparisons) -> [B]`: by how much the model prefers the chosen; to be jitted."""
  config = parts.config
  difference = objective_of(config.objective).difference
  assert difference is not None
  return lambda params, batch: difference(config.objective, actors, params, batch)


def make_losses(parts: StageParts, actors: Actors) -> Callable[[Any, Any], dict[str, Mean]]:
  """`(params, batch) -> ` loss and metrics of each row by itself; to be jitted."""
  config = parts.config
  objective = objective_of(config.objective)

  def losses(params: Any, batch: Any) -> dict[str, Mean]:
    def row_loss(row: Any) -> dict[str, Mean]:
      alone = jax.tree.map(lambda x: x[None], row)
      mean, metrics = objective.loss(config.objective, actors, params, alone)
      return {'loss': mean, **{k: v for k, v in metrics.items() if isinstance(v, Mean)}}

    return jax.vmap(row_loss)(batch)

  return losses


def preference_question(
  parts: StageParts, actors: Actors, columns: pipeline.Columns, prepare: Callable[[Any, Any], Any]
) -> Question:
  """Does the model prefer what people preferred, on held-out comparisons?

  Args:
    parts: the stage's pieces.
    actors: apply functions of the objective.
    columns: held-out comparisons.
    prepare: from `(params, batch)`, what training does to a batch before its update (adds the
      reference's log-probs).
  """
  differences = jax.jit(make_differences(parts, actors))

  def question(params: Any, step: int) -> Evaluation:
    del step
    found = [
      to_host(differences(params, prepare(params, batch)))[real]
      for batch, real in device_batches(parts, columns)
    ]
    differences_found, labels = np.concatenate(found), columns.extras['preference']
    scores = preference_scores(differences_found, labels)
    return Evaluation(
      {f'held_out_{name}': value for name, value in scores.items()},
      {
        'held_out_right': verdicts_right(differences_found, labels),
        'held_out_log_loss': log_losses(differences_found, labels),
      },
    )

  return question


def loss_question(
  parts: StageParts, actors: Actors, columns: pipeline.Columns, prepare: Callable[[Any, Any], Any]
) -> Question:
  """What are loss and metrics of the objective on held-out records, each by itself?

  Args:
    parts: the stage's pieces.
    actors: apply functions of the objective.
    columns: held-out records.
    prepare: from `(params, batch)`, what training does to a batch before its update.
  """
  one_by_one = jax.jit(make_losses(parts, actors))

  def question(params: Any, step: int) -> Evaluation:
    del step
    found: dict[str, list[np.ndarray]] = {}
    for batch, real in device_batches(parts, columns):
      for name, mean in to_host(one_by_one(params, prepare(params, batch))).items():
        found.setdefault(name, []).append(np.stack([mean.total, mean.weight], axis=1)[real])
    rows = {f'held_out_{name}': np.concatenate(parts) for name, parts in found.items()}
    totals = {name: array.sum(0, dtype=np.float64) for name, array in rows.items()}
    return Evaluation(
      {name: float(total / max(weight, 1e-8)) for name, (total, weight) in totals.items()},
      {
        f'{name}_{part}': array[:, column]
        for name, array in rows.items()
        for column, part in enumerate(('total', 'weight'))
      },
    )

  return question


def sample_scores(
  parts: Parts,
  score: Callable[[Sequences], Any],
  params: Roles,
  key: Array,
  columns: pipeline.Columns,
  rounds: int,
  batch_size: int | None = None,
) -> np.ndarray:
  """`[rounds, N, ...]` float64: scores of `rounds` independent responses to each prompt.

  `score` gives `[B, ...]`: one number a response, or several.
  """
  sample = jax.jit(make_sampler(parts))
  size = parts.config.evaluation.batch_size if batch_size is None else batch_size
  count = len(columns)
  found = []
  for start in range(0, rounds * count, size):
    rows = np.arange(start, start + size)
    # Each response has a number of its own, and so its own random numbers; some fill up the batch.
    prompts = columns.take(rows % count)
    assert isinstance(prompts, Prompts)
    batch = dataclasses.replace(prompts, index=rows.astype(np.int32))
    scores = to_host(score(sample(params, put_batch(batch, parts.mesh), key)[0]))
    found.append(scores[: rounds * count - start].astype(np.float64))
  scores = np.concatenate(found)
  return scores.reshape(rounds, count, *scores.shape[1:])


def best_of_n_question(
  parts: Parts, reward_model: FrozenRewardModel, sizes: Sequence[int], samples: int
) -> Question:
  """What would the best of n responses be worth, the reward model being the judge?

  Args:
    parts: the stage's pieces.
    reward_model: the judge.
    sizes: every n to answer for.
    samples: responses drawn to each prompt; the answers are expectations over subsets of them.
  """
  config, task = parts.config.evaluation, parts.feedback.task
  score = make_score(reward_model)

  def judge(rows: Sequences) -> np.ndarray:
    proxy = to_host(score(rows).scores)
    if task is None:
      return proxy[:, None]
    texts = decode_sequences(to_host(rows), parts.tokenizer.decode)
    return np.stack([proxy, task.gold_reward(*texts)], axis=1)

  def question(params: Any, step: int) -> Evaluation:
    del step
    key = prng.stream_key(prng.base_key(config.seed), prng.Stream.EVALUATION, _BEST_OF_N)
    columns = prompt_columns(parts, 'held_out', config.prompts)
    found = sample_scores(parts, judge, params, key, columns, samples)
    proxy = found[..., 0].T
    numbers: dict[str, float] = {}
    arrays: dict[str, np.ndarray] = {}
    for n in sizes:
      numbers[f'best_of_{n}_kl'] = best_of_n_kl(n)
      for column, name in enumerate(('proxy_reward', 'gold_reward')[: found.shape[-1]]):
        values = best_of_n(proxy, found[..., column].T, n)
        numbers[f'best_of_{n}_{name}'] = float(values.mean())
        arrays[f'best_of_{n}_{name}'] = values
    return Evaluation(numbers, arrays)

  return question


def reference_rewards(parts: Parts, samples: int) -> np.ndarray:
  """Gold rewards of the reference's own responses to the evaluation prompts, `[prompts, samples]`.

  What the optimal reward-KL frontier is estimated from. Raises DataError without a gold reward.
  """
  task, config = parts.feedback.task, parts.config.evaluation
  if task is None:
    raise DataError(f'{parts.feedback.source}: it has no gold reward, so no known optimum.')

  def gold(sequences: Sequences) -> np.ndarray:
    return task.gold_reward(*decode_sequences(to_host(sequences), parts.tokenizer.decode))

  columns = prompt_columns(parts, 'held_out', config.prompts)
  key = prng.stream_key(prng.base_key(config.seed), prng.Stream.EVALUATION, _FRONTIER)
  reference = {'policy': parts.reference}
  batch_size = _FRONTIER_BATCHES * config.batch_size
  return sample_scores(parts, gold, reference, key, columns, samples, batch_size).T
