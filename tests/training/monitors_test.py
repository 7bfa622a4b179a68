"""Monitors on made-up rows: when they speak, what they say, and that a resume changes nothing."""

import json
from typing import Any

import numpy as np
import pytest

from rlhf_jax.training.health import HealthConfig, MonitorConfig, SpikeConfig
from rlhf_jax.training.monitors import Event, Monitors


def spoken(config: HealthConfig, rows: list[dict[str, float]]) -> list[tuple[int, str]]:
  monitors = Monitors(config)
  events = [event for step, row in enumerate(rows, 1) for event in monitors.see_row(step, row)]
  return [(event.step, event.monitor) for event in events]


@pytest.mark.parametrize(
  ('monitor', 'metric', 'limit', 'values', 'expected'),
  [
    ('kl', 'kl', 10.0, [0.0, 9.9, 10.1], 3),
    ('entropy', 'entropy', 0.1, [2.0, 0.21, 0.19], 3),
    ('length', 'length', 2.0, [10.0, 19.0, 21.0], 3),
    ('length', 'length', 2.0, [10.0, 5.5, 4.5], 3),
    ('repetition', 'repetition', 0.25, [0.3, 0.54, 0.56], 3),
    ('disagreement', 'reward_disagreement', 3.0, [0.5, 1.4, 1.6], 3),
    ('length', 'length', 2.0, [10.0, 0.0], 2),  # nothing is said any more
    ('length', 'length', 2.0, [0.0, 10.0, 21.0], 3),
    ('disagreement', 'reward_disagreement', 3.0, [0.0, 0.5, 1.6], 3),
    ('entropy', 'entropy', 0.1, [0.0, 2.0, 0.1], 3),
  ],
)
def test_a_limit_is_met_where_it_says(
  monitor: str, metric: str, limit: float, values: list[float], expected: int
) -> None:
  """Short of it nothing is said, beyond it once; at limit 0 never."""
  rows = [{metric: value} for value in values]
  config = HealthConfig()
  setattr(config, monitor, MonitorConfig(limit=limit))
  assert spoken(config, rows) == [(expected, monitor)]
  setattr(config, monitor, MonitorConfig(limit=0.0))
  assert spoken(config, rows) == []


def test_it_speaks_again_only_after_the_value_has_come_back() -> None:
  config = HealthConfig(kl=MonitorConfig(limit=10.0))
  rows = [{'kl': value} for value in (5.0, 11.0, 12.0, 9.0, 11.0)]
  assert spoken(config, rows) == [(2, 'kl'), (5, 'kl')]


def test_an_event_has_all_that_is_to_be_said() -> None:
  config = HealthConfig(length=MonitorConfig(limit=2.0, action='stop'))
  monitors = Monitors(config)
  assert monitors.see_row(10, {'length': 20.0, 'loss': 1.0}) == []
  (event,) = monitors.see_row(20, {'length': 50.0})
  assert event[:5] == (20, 'length', 2.5, 2.0, 'stop')
  assert event.text == 'responses have 50 tokens, 20 at first'
  assert event.row().keys() == {'monitor', 'value', 'limit', 'action', 'text'}


def test_what_is_absent_or_not_finite_is_no_first() -> None:
  config = HealthConfig(entropy=MonitorConfig(limit=0.5))
  rows = [{'loss': 1.0}, {'entropy': float('nan')}, {'entropy': 2.0}, {'entropy': 0.9}]
  assert spoken(config, rows) == [(4, 'entropy')]


STEPS = [0, 2, 0, 1, 1, 1, 0, 1]


def test_skipped_steps_are_counted_and_capped() -> None:
  """More than 2 in a row, or more than 4 in all, ask for the end; spared steps begin anew."""
  monitors = Monitors(HealthConfig(nonfinite='skip', max_skipped_in_a_row=2, max_skipped=4))
  stops: list[tuple[int, str]] = []
  for step, count in enumerate(STEPS, 1):
    events = monitors.see_step(step, {'skipped_updates': count}, 'loss nan')
    assert sum(event.action == 'skip' for event in events) == (count > 0)
    stops += [(event.step, event.monitor) for event in events if event.action == 'stop']
  assert stops == [(6, 'max_skipped_in_a_row'), (8, 'max_skipped')]
  assert (monitors.skipped_steps, monitors.skipped_updates) == (5, 6)


def test_a_spike_is_said_with_its_action() -> None:
  monitors = Monitors(HealthConfig(gradient_spike=SpikeConfig(factor=5.0, action='stop')))
  assert monitors.see_step(1, {'gradient_spikes': 0, 'gradient_spike_ratio': 4.0}, '') == []
  (event,) = monitors.see_step(2, {'gradient_spikes': 1, 'gradient_spike_ratio': 8.0}, '')
  assert event[:5] == (2, 'gradient_spike', 8.0, 5.0, 'stop')


def evaluation(gold: float, proxy: float, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
  noise = np.random.default_rng(seed).normal(size=100)
  array = gold + 0.5 * (noise - noise.mean())
  arrays = {'gold_reward': array, 'proxy_reward': np.full(100, proxy)}
  return {'gold_reward': gold, 'proxy_reward': proxy}, arrays


@pytest.mark.parametrize(
  ('gold', 'proxy', 'warned'),
  [
    (1.5, 3.0, True),  # down by 0.5, of which a standard error is some 0.07
    (1.9, 3.0, False),  # within the noise
    (1.5, 1.0, False),  # the proxy fell as well: another reason
    (2.5, 3.0, False),
  ],
)
def test_gold_down_while_the_proxy_rises_is_over_optimisation(
  gold: float, proxy: float, warned: bool
) -> None:
  monitors = Monitors(HealthConfig())
  assert monitors.see_evaluation(0, *evaluation(1.0, 1.0, 0)) == []
  assert monitors.see_evaluation(10, *evaluation(2.0, 2.0, 1)) == []
  assert monitors.see_evaluation(11, {'gold_reward': 0.0}, {}) == [], 'no proxy'
  events = monitors.see_evaluation(20, *evaluation(gold, proxy, 2))
  assert bool(events) == warned
  if warned:
    assert events[0].monitor == 'overoptimisation' and 'since step 10' in events[0].text
    first, last = (evaluation(*x)[1]['gold_reward'] for x in ((2.0, 2.0, 1), (1.5, 3.0, 2)))
    difference = first - last
    expected = difference.mean() / (difference.std(ddof=1) / 10)
    assert events[0].value == pytest.approx(expected)


def test_a_first_of_nothing_in_an_older_checkpoint_is_none() -> None:
  """Monitors once kept a first of 0, of which there is no ratio."""
  config = HealthConfig(length=MonitorConfig(limit=2.0))
  monitors = Monitors(config, {'first': {'length': 0.0, 'repetition': 0.0}})
  assert monitors.see_row(1, {'length': 5.0, 'repetition': 0.1}) == []
  (event,) = monitors.see_row(2, {'length': 11.0, 'repetition': 0.1})
  assert event.monitor == 'length' and monitors.facts()['first'] == {
    'length': 5.0,
    'repetition': 0.0,
  }


def test_gold_that_falls_alike_for_every_prompt_is_no_chance() -> None:
  """The standard error of equal falls is 0; of one prompt there is none."""
  for prompts, said in ((4, True), (1, False)):
    monitors = Monitors(HealthConfig())
    for step, (gold, proxy) in enumerate([(1.0, 1.0), (0.5, 2.0)]):
      arrays = {'gold_reward': np.full(prompts, gold), 'proxy_reward': np.full(prompts, proxy)}
      events = monitors.see_evaluation(step, {'gold_reward': gold, 'proxy_reward': proxy}, arrays)
    assert [event.monitor for event in events] == ['overoptimisation'] * said
    assert all(event.value == float('inf') for event in events)


@pytest.mark.parametrize('at', range(1, 8))
def test_a_resume_says_what_an_undisturbed_run_says(at: int) -> None:
  """Facts through JSON after any step: firsts, what has been said, counts and the best step."""
  config = HealthConfig(nonfinite='skip', max_skipped_in_a_row=2, kl=MonitorConfig(limit=1.0))
  rng = np.random.default_rng(0)
  rows = [{'kl': float(kl), 'length': 10 * float(kl)} for kl in rng.uniform(0.5, 1.5, size=8)]

  def see(monitors: Monitors, step: int) -> list[Event]:
    return [
      *monitors.see_step(step, {'skipped_updates': STEPS[step - 1]}, 'loss nan'),
      *monitors.see_row(step, rows[step - 1]),
      *monitors.see_evaluation(step, *evaluation(2.0 - 0.3 * step, float(step), step)),
    ]

  whole = Monitors(config)
  expected = [see(whole, step) for step in range(1, 9)]
  first = Monitors(config)
  found = [see(first, step) for step in range(1, at + 1)]
  second = Monitors(config, json.loads(json.dumps(first.facts())))
  found += [see(second, step) for step in range(at + 1, 9)]
  assert found == expected and sum(map(len, expected)) > 5
  assert second.facts() == whole.facts()
