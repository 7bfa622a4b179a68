"""piql.npz: implicit Q-learning on learnt rewards, as the authors of CPL run it.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/jhejna/cpl
  git -C cpl checkout b333667bc2952c8b8cc968662d1bc3e67e108b8e
  pip install torch numpy
  python -m tests.golden.make_piql cpl
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

ROWS, STEPS = 6, 5
CASES: dict[str, dict[str, float]] = {
  'defaults': {'expectile': 0.7, 'temperature': 3.0, 'max_weight': 100.0, 'gamma': 0.99},
  'cut_weights': {'expectile': 0.9, 'temperature': 10.0, 'max_weight': 2.0, 'gamma': 0.9},
}


class Taken(torch.distributions.Distribution):
  """A policy that gives known log-probs, whatever was done."""

  def __init__(self, logprobs: torch.Tensor):
    super().__init__(validate_args=False)
    self.logprobs = logprobs

  def log_prob(self, value: torch.Tensor) -> torch.Tensor:
    return self.logprobs


def step(path: Any, t: dict[str, Any], settings: dict[str, float]) -> dict[str, float]:
  """The metrics of one training step; gradients are left at the tensors."""
  scope: dict[str, Any] = {'torch': torch}
  making.definition(path, 'iql_loss', scope)
  train_step = making.definition(path, 'PIQL.train_step', scope)
  answers = iter([t['values'][None], t['next_values'].detach()[None]])
  rewards = torch.nn.functional.pad(t['rewards'].detach(), (0, 1), value=9.0)  # the last is cut
  network = SimpleNamespace(
    encoder=lambda x: x,
    value=lambda obs: next(answers),
    critic=lambda obs, action: t['q'],
    actor=lambda obs: Taken(t['logprobs']),
    reward=lambda obs, action: rewards[None],
  )
  nothing = SimpleNamespace(zero_grad=lambda **_: None, step=lambda: None)
  trainer = SimpleNamespace(
    network=network,
    target_network=SimpleNamespace(critic=lambda obs, action: t['target_q'].detach()),
    optim={name: nothing for name in ('reward', 'value', 'actor', 'critic')},
    reward_steps=0,
    expectile=settings['expectile'],
    beta=1 / settings['temperature'],
    clip_score=settings['max_weight'],
    target_freq=2,
  )
  discount = settings['gamma'] * torch.nn.functional.pad(t['not_done'].double(), (0, 1))
  blank = torch.zeros(ROWS, STEPS + 1, 1, dtype=torch.float64)
  batch = {'label': torch.ones(ROWS // 2)}
  for name, whole in (('obs', blank), ('action', blank), ('discount', discount)):
    batch[f'{name}_1'], batch[f'{name}_2'] = whole.chunk(2)
  return train_step(trainer, batch, 1, 10)


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  rng = np.random.default_rng(21)
  shape = (ROWS, STEPS)
  inputs = {
    'mask': np.ones(shape, bool),
    'not_done': np.arange(STEPS) < rng.integers(2, STEPS + 1, (ROWS, 1)),
    'values': making.float32(rng.normal(0, 1, shape)),
    'next_values': making.float32(rng.normal(0, 1, shape)),
    'q': making.float32(rng.normal(0, 1, (2, *shape))),
    'target_q': making.float32(rng.normal(0.2, 1, (2, *shape))),
    'rewards': making.float32(rng.normal(0, 0.5, shape)),
    'logprobs': making.float32(rng.normal(-1, 1, shape)),
  }
  about = {
    'reference': 'jhejna/cpl',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'research/algs/piql.py: PIQL.train_step',
    'note': 'q and target_q [2, N, T]; q_loss is a mean over both Q. Gradients are of the three '
    'losses, each by what it trains; `loss` is their sum.',
  }
  fixture = making.Fixture('piql', about, inputs)
  for case, settings in CASES.items():
    t = making.tensors(inputs)
    found = step(checkout / 'research' / 'algs' / 'piql.py', t, settings)
    losses = {name: np.float64(found[f'{name}_loss']) for name in ('v', 'q', 'actor')}
    gradients = {name: t[name].grad for name in ('values', 'q', 'logprobs')}
    fixture.add(case, settings, {**losses, 'loss': sum(losses.values())}, gradients)
  fixture.save()


if __name__ == '__main__':
  main()
