"""reward.npz: the Bradley-Terry loss of TRL's reward trainer, with margins and centring.

Set-up, with a torch for CPU in a virtual environment:

  pip install torch trl==1.16.0
  python -m tests.golden.make_reward
"""

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl import RewardTrainer

from tests.golden import making

CASES: dict[str, dict[str, Any]] = {
  'plain': {'margin': False, 'center': None},
  'margin': {'margin': True, 'center': None},
  'centred': {'margin': False, 'center': 0.01},
  'both': {'margin': True, 'center': 0.5},
}


def loss_of(scores: torch.Tensor, margin: torch.Tensor, settings: dict[str, Any]) -> Any:
  """(loss, metrics) of scores `[B, 2]`, chosen first."""
  metrics: Any = {'train': collections.defaultdict(list)}
  same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
  trainer = SimpleNamespace(
    model=SimpleNamespace(training=True),
    args=SimpleNamespace(center_rewards_coefficient=settings['center']),
    accelerator=same,
    _metrics=metrics,
    _total_train_tokens=0,
    _tp_size=1,
  )
  inputs = {'attention_mask': torch.ones(2 * len(scores), 1)}
  if settings['margin']:
    inputs['margin'] = margin
  logits = scores.T.reshape(-1, 1)  # all chosen, then all rejected
  model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
  return RewardTrainer.compute_loss(trainer, model, inputs), metrics['train']


def main() -> None:
  rng = np.random.default_rng(11)
  inputs = {
    'scores': making.float32(rng.normal(0, 1.5, (6, 2))),
    'margins': making.float32(np.abs(rng.normal(0, 1, 6))),
  }
  about = {
    'reference': 'huggingface/trl',
    'version': f'trl {trl.__version__}',
    'torch': torch.__version__,
    'function': 'trl RewardTrainer.compute_loss',
    'note': 'scores [B, 2], chosen first.',
  }
  fixture = making.Fixture('reward', about, inputs)
  t = making.tensors(inputs)
  for case, settings in CASES.items():
    loss, metrics = loss_of(t['scores'], t['margins'].detach(), settings)
    outputs = {'loss': loss, 'accuracy': np.float64(metrics['accuracy'][0])}
    fixture.differentiate(case, settings, outputs, {'scores': t['scores']})
  fixture.save()


if __name__ == '__main__':
  main()
