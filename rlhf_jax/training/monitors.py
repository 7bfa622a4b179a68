"""Watches what a run logs: skipped updates, spikes, and the ways in which policies go astray.

On the host, from numbers that are there anyway. Everything that it remembers is in `facts`, which
belong to a checkpoint: a resumed run says the same as one that was never interrupted.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.training.health import HealthConfig, MonitorConfig


class Event(NamedTuple):
  """Something that a monitor has to say.

  Attributes:
    step: the iteration it is about.
    monitor: its name.
    value: what was measured.
    limit: where the monitor speaks.
    action: 'warn', 'skip' or 'stop'.
    text: the same in words.
  """

  step: int
  monitor: str
  value: float
  limit: float
  action: str
  text: str

  def row(self) -> dict[str, Any]:
    """A row of health.jsonl, without its step."""
    return {name: value for name, value in self._asdict().items() if name != 'step'}


# Monitors of rows: the metric that each reads, and how its value comes of the metric and its first.
_METRICS = {
  'kl': 'kl',
  'entropy': 'entropy',
  'length': 'length',
  'repetition': 'repetition',
  'disagreement': 'reward_disagreement',
}
# Those that compare as a ratio: with the first row that is not 0.
_RATIOS = ('entropy', 'length', 'disagreement')
# Those that speak of evaluations.
OF_EVALUATIONS = ('overoptimisation',)
# What is wrong, with the metric, its first and the value.
_TEXTS = {
  'kl': 'the policy is {now:.4g} nats a response from the reference',
  'entropy': 'entropy has fallen from {first:.4g} to {now:.4g} nats a token',
  'length': 'responses have {now:.4g} tokens, {first:.4g} at first',
  'repetition': 'repeated 4-grams are {now:.1%} of a response, {first:.1%} at first',
  'disagreement': 'reward models disagree by {now:.4g}, by {first:.4g} at first',
}


def _limits(config: HealthConfig) -> dict[str, MonitorConfig]:
  """The monitors' settings by name."""
  return {
    'kl': config.kl,
    'entropy': config.entropy,
    'length': config.length,
    'repetition': config.repetition,
    'disagreement': config.disagreement,
    'overoptimisation': config.overoptimisation,
  }


def _measure(monitor: str, now: float, first: float) -> float:
  """The number that a monitor compares with its limit; `first` is > 0 for those of `_RATIOS`."""
  if monitor == 'kl':
    return now
  if monitor == 'repetition':
    return now - first
  ratio = now / first
  if monitor == 'length' and ratio < 1:
    return 1 / ratio if ratio else math.inf
  return ratio


def _standard_errors(fallen: np.ndarray) -> float:
  """How far a mean is from 0, in its standard errors; 0 where there is no telling."""
  mean = float(fallen.mean())
  if len(fallen) < 2 or mean == 0:
    return 0.0
  error = float(fallen.std(ddof=1) / math.sqrt(len(fallen)))
  return mean / error if error else math.copysign(math.inf, mean)


class Monitors:
  """The monitors of one run."""

  def __init__(self, config: HealthConfig, facts: Mapping[str, Any] | None = None):
    """Begins anew, or where the `facts` of a checkpoint left off."""
    self._config, self._limits = config, _limits(config)
    facts = {} if facts is None else facts
    self.skipped_steps = int(facts.get('skipped_steps', 0))
    self.skipped_updates = int(facts.get('skipped_updates', 0))
    self._in_a_row = int(facts.get('in_a_row', 0))
    firsts: Mapping[str, float] = facts.get('first', {})
    # Earlier versions kept firsts of 0, of which there is no ratio.
    self._first = {name: x for name, x in firsts.items() if name not in _RATIOS or x > 0}
    self._speaking: set[str] = set(facts.get('speaking', ()))
    self._best: dict[str, Any] | None = facts.get('best')

  def facts(self) -> dict[str, Any]:
    """JSON values from which to go on."""
    return {
      'skipped_steps': self.skipped_steps,
      'skipped_updates': self.skipped_updates,
      'in_a_row': self._in_a_row,
      'first': self._first,
      'speaking': sorted(self._speaking),
      'best': self._best,
    }

  def see_step(self, step: int, values: Mapping[str, float], reason: str) -> list[Event]:
    """What is to be said of an iteration.

    Args:
      step: its number, from 1.
      values: its metrics.
      reason: why updates were left out, if any were.
    """
    events = []
    spike = self._config.gradient_spike
    if values.get('gradient_spikes', 0) > 0:
      ratio = values['gradient_spike_ratio']
      text = f'a gradient norm is {ratio:.4g} times the median of the last {spike.window} updates'
      events.append(Event(step, 'gradient_spike', ratio, spike.factor, spike.action, text))
    count = int(values.get('skipped_updates', 0))
    if not count:
      self._in_a_row = 0
      return events
    self.skipped_steps += 1
    self.skipped_updates += count
    self._in_a_row += 1
    text = f'{count} updates skipped ({self.skipped_updates} so far): {reason}'
    events.append(Event(step, 'skipped_updates', float(count), 0.0, 'skip', text))
    for name, found, limit in (
      ('max_skipped_in_a_row', self._in_a_row, self._config.max_skipped_in_a_row),
      ('max_skipped', self.skipped_steps, self._config.max_skipped),
    ):
      if 0 < limit < found:
        text = f'updates of {found} steps were skipped, over health.{name} {limit}; {reason}'
        events.append(Event(step, name, float(found), float(limit), 'stop', text))
    return events

  def see_row(self, step: int, values: Mapping[str, float]) -> list[Event]:
    """What is to be said of a row of metrics of a policy's own samples."""
    events = []
    for monitor, metric in _METRICS.items():
      now = values.get(metric)
      if now is None or not math.isfinite(now):
        continue
      if monitor in _RATIOS and monitor not in self._first and now <= 0:
        continue
      first = self._first.setdefault(monitor, now)
      value = _measure(monitor, now, first)
      text = _TEXTS[monitor].format(now=now, first=first)
      events += self._compare(self._limits[monitor], step, monitor, value, text)
    return events

  def see_evaluation(
    self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, np.ndarray]
  ) -> list[Event]:
    """What is to be said of an evaluation: gold reward down, proxy up since the best step.

    Gao et al. 2022, "Scaling laws for reward model overoptimization".
    """
    if not {'gold_reward', 'proxy_reward'} <= scalars.keys() & arrays.keys():
      return []
    gold, proxy = np.asarray(arrays['gold_reward'], np.float64), scalars['proxy_reward']
    if not (np.isfinite(gold).all() and math.isfinite(proxy)):
      return []
    best = self._best
    if best is None or gold.mean() > np.mean(best['gold']):
      self._best = {'step': step, 'gold': gold.tolist(), 'proxy': proxy}
      best = self._best
    fallen = np.asarray(best['gold']) - gold
    value = _standard_errors(fallen) if proxy > best['proxy'] else 0.0
    text = (
      f'gold reward has fallen by {fallen.mean():.4g} since step {best["step"]} while the proxy '
      f'reward has risen by {proxy - best["proxy"]:.4g}: {value:.3g} standard errors'
    )
    limit = self._limits['overoptimisation']
    return self._compare(limit, step, 'overoptimisation', value, text)

  def _compare(
    self, config: MonitorConfig, step: int, monitor: str, value: float, text: str
  ) -> list[Event]:
    """Speaks where a limit is crossed; then not again until the value has come back."""
    beyond = value < config.limit if monitor == 'entropy' else value > config.limit
    if not (config.limit > 0 and beyond):
      self._speaking.discard(monitor)
      return []
    if monitor in self._speaking:
      return []
    self._speaking.add(monitor)
    return [Event(step, monitor, value, config.limit, config.action, text)]
