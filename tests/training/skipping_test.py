"""Whole stages with bad numbers in them: skipped, counted, resumed through, or stopped at."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax.common import trees
from rlhf_jax.common.errors import HealthError, NonFiniteError
from rlhf_jax.config import InitConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.training import dumps
from rlhf_jax.training.checkpoints import CheckpointConfig
from rlhf_jax.training.health import HealthConfig, MonitorConfig
from rlhf_jax.training.recipe import Recipe
from rlhf_jax.training.writers import read_rows
from tests import tiny
from tests.training.loop_test import killed_at, rows, terminated_at

SKIP = HealthConfig(nonfinite='skip')
# What it says depends on the responses alone, so that a resumed run meets the same.
REWARD = """
import hashlib

def score(prompts, responses):
  digests = [hashlib.sha256((p + '|' + r).encode()).digest() for p, r in zip(prompts, responses)]
  return [float('{bad}') if d[0] < {below} else d[1] / 256 for d in digests]
"""


def reward_config(
  case: str,
  parents: pathlib.Path,
  folder: pathlib.Path,
  below: int,
  bad: str = 'nan',
  **changes: Any,
) -> Any:
  """A stage that is paid by a function that has no answer for `below` of 256 responses."""
  file = folder / 'reward.py'
  file.write_text(REWARD.format(below=below, bad=bad))
  rollout = RolloutConfig(rewards=(RewardConfig(source=f'{file}:score'),))
  config = tiny.make_config(case, parents, rollout=rollout, **changes)
  config.reward_model.init = None
  return config


def poisoned(step: int) -> Any:
  """A wrapper: in the batch of a step, from 1, the reference has no answer for one token."""

  def wrap(recipe: Recipe) -> Recipe:
    def prepare(state: Any, batch: Any) -> Any:
      prepared = recipe.prepare(state, batch)
      if int(state.step) != step - 1:
        return prepared
      logprobs = prepared.batch.reference_logprobs.at[3, 1, 0].set(np.nan)
      return prepared._replace(
        batch=dataclasses.replace(prepared.batch, reference_logprobs=logprobs)
      )

    return recipe._replace(prepare=prepare)

  return wrap


def test_a_bad_batch_is_skipped_counted_and_left_out_of_the_row(
  parents: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Step 3 of 6 is bad. Its row has the loss of step 4 alone; the result counts one update."""
  config = tiny.make_config('dpo', parents, steps=6, health=SKIP)
  done = tiny.run_stage(config, tmp_path / 'run', wrap=poisoned(3))
  assert int(done.loop.state.step) == 6 and int(done.loop.state.opt_state[1].count) == 5
  assert all(np.isfinite(leaf).all() for leaf in trees.flatten(done.loop.state).values())
  found = rows(tmp_path / 'run', 'metrics')
  assert [row['skipped_updates'] for row in found] == [0, 1, 0]
  assert all(np.isfinite(row['loss']) for row in found)
  assert done.outcome.run.result is not None and done.outcome.run.result['skipped_updates'] == 1
  (event,) = read_rows(tmp_path / 'run' / 'health.jsonl')
  assert (event['step'], event['monitor'], event['value']) == (3, 'skipped_updates', 1)
  assert 'step 3: 1 updates skipped (1 so far): loss nan' in capsys.readouterr().out
  assert dumps.steps(tmp_path / 'run') == [3]
  each = dataclasses.replace(config, log=dataclasses.replace(config.log, every=1))
  tiny.run_stage(each, tmp_path / 'each', wrap=poisoned(3))
  single = rows(tmp_path / 'each', 'metrics')
  assert 'loss' not in single[2] and single[2]['tokens'] > single[1]['tokens']
  assert found[1]['loss'] == single[3]['loss']


@pytest.mark.slow
@pytest.mark.parametrize('case', ['ppo', 'reinforce', 'best_of_n'])
def test_a_resume_through_skipped_steps_is_exact(
  case: str, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Rewards that are not finite, in several steps, before and after a kill: the same bits.

  best_of_n has a finite loss whatever the scores are; reinforce a running mean that nan would spoil
  for ever.
  """
  health = HealthConfig(nonfinite='skip', max_skipped_in_a_row=0, max_skipped=0)
  below = 8 if case == 'best_of_n' else 24
  config = reward_config(case, parents, tmp_path, below, health=health)
  config.checkpoint = CheckpointConfig(every=5)
  whole = tiny.run_stage(config, tmp_path / 'whole')
  events = read_rows(tmp_path / 'whole' / 'health.jsonl')
  skipped = [event['step'] for event in events if event['monitor'] == 'skipped_updates']
  assert min(skipped) <= 5 < max(skipped) and len(skipped) < 10, 'the test needs both kinds'
  assert all(
    'reward.py:score is nan in row' in event['text'] for event in events if event['step'] in skipped
  )
  updates = {'ppo': 4, 'reinforce': 1, 'best_of_n': 1}[case]
  counted = sum(row['skipped_updates'] for row in rows(tmp_path / 'whole', 'metrics'))
  assert counted == updates * len(skipped), 'all updates of such a step'
  assert int(whole.loop.state.opt_state[1].count) == updates * (10 - len(skipped))
  assert all(np.isfinite(leaf).all() for leaf in trees.flatten(whole.loop.state).values())

  with pytest.raises(KeyboardInterrupt):
    tiny.run_stage(config, tmp_path / 'parts', wrap=killed_at(8))
  both = tiny.run_stage(config, tmp_path / 'parts')
  assert trees.sha256(both.loop.state) == trees.sha256(whole.loop.state)
  assert read_rows(tmp_path / 'parts' / 'health.jsonl') == events
  assert rows(tmp_path / 'parts', 'metrics') == rows(tmp_path / 'whole', 'metrics')
  assert both.loop.skipped_updates == whole.loop.skipped_updates == counted


@pytest.mark.slow
def test_too_many_skipped_steps_stop_the_run(parents: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """A function that never has an answer: after 3 steps in a row the run ends, and says why."""
  health = HealthConfig(nonfinite='skip', max_skipped_in_a_row=3)
  config = reward_config('reinforce', parents, tmp_path, 256, health=health)
  with pytest.raises(NonFiniteError, match='max_skipped_in_a_row 3; reward .*score is nan'):
    tiny.run_stage(config, tmp_path / 'run')
  assert dumps.steps(tmp_path / 'run') == [1, 4]


@pytest.mark.slow
@pytest.mark.parametrize('bad', ['nan', '-inf'])
def test_a_reward_that_is_not_finite_stops_the_run_by_name_and_row(
  bad: str, parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Also where the loss stays finite: best_of_n only sorts by scores."""
  config = reward_config('best_of_n', parents, tmp_path, 16, bad)
  with pytest.raises(NonFiniteError) as caught:
    tiny.run_stage(config, tmp_path / 'run')
  (step,) = dumps.steps(tmp_path / 'run')
  kept = dumps.load(tmp_path / 'run', step)
  (scores,) = kept.rewards.values()
  bad_rows = np.flatnonzero(~np.isfinite(scores))
  assert len(scores) == 4 * tiny.ROWS and len(bad_rows) == kept.values['nonfinite_rewards'] > 0
  named = ', '.join(map(str, bad_rows[:5]))
  assert f'reward.py:score is {bad} in row' in str(caught.value) and named in str(caught.value)


@pytest.mark.slow
def test_a_monitor_stops_with_its_state_saved_and_the_same_command_goes_on(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """A limit on KL that any step exceeds: an error that says all, then the bits of a warning."""
  limit = MonitorConfig(limit=1e-6, action='stop')
  config = reward_config('reinforce', parents, tmp_path, 0, steps=6)
  config.health = HealthConfig(kl=limit)
  with pytest.raises(HealthError) as caught:
    tiny.run_stage(config, tmp_path / 'run')
  (event,) = read_rows(tmp_path / 'run' / 'health.jsonl')
  assert event['action'] == 'stop' and event['limit'] == 1e-6 and event['value'] > 1e-6
  for part in (f'step {event["step"]}', 'nats a response', 'health.kl.limit', 'same command'):
    assert part in str(caught.value)
  # So it does where a second signal has ended the run in the step after the row.
  twice = terminated_at(event['step'] + 1, times=2)
  with pytest.raises(HealthError, match=f'The state of step {event["step"]} is saved'):
    tiny.run_stage(config, tmp_path / 'signalled', wrap=twice)
  again = tiny.run_stage(config, tmp_path / 'run')
  config.health = HealthConfig(kl=dataclasses.replace(limit, action='warn'))
  whole = tiny.run_stage(config, tmp_path / 'whole')
  assert trees.sha256(again.loop.state) == trees.sha256(whole.loop.state)
  first, second = (read_rows(tmp_path / x / 'health.jsonl') for x in ('run', 'whole'))
  assert [e['step'] for e in first] == [e['step'] for e in second]


@pytest.mark.slow
def test_rows_of_online_stages_have_what_monitors_read(
  parents: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """An ensemble disagrees; samples have entropy and repetition."""
  config = tiny.make_config('online_dpo', parents, steps=2)
  other = dataclasses.replace(
    tiny.make_config('reward_model', parents, steps=2, seed=1), name='other'
  )
  other.policy = InitConfig(init=str(parents / 'sft'))
  tiny.run_stage(other, tmp_path / 'other')
  config.reward_model.ensemble = (str(tmp_path / 'other'),)
  tiny.run_stage(config, tmp_path / 'run')
  (row,) = rows(tmp_path / 'run', 'metrics')
  assert row['reward_disagreement'] > 0 and row['entropy'] > 0 and 0 <= row['repetition'] < 1
  assert row['nonfinite_rewards'] == 0 and 'skipped_updates' not in row
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['identity']['config']['health']
