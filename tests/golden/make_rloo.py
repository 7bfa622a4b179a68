"""rloo.npz: REINFORCE leave-one-out in today's TRL, and in TRL 0.15 with its KL per token.

Set-up: a virtual environment with torch for CPU, then

  pip install trl==1.16.0
  git clone --branch v0.15.2 https://github.com/huggingface/trl
  python -m tests.golden.make_rloo trl
"""

import inspect
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer import rloo_trainer
from trl.trainer.rloo_trainer import RLOOTrainer

from tests.golden import making

GROUP = 4
NEW: dict[str, Any] = {
  'beta': 0.05,
  'epsilon_low': 0.2,
  'epsilon_high': 0.2,
  'normalize_advantages': False,
  'reward_clip_range': None,
}
OLD: dict[str, Any] = {
  'kl_coef': 0.05,
  'cliprange': 0.2,
  'token_level_kl': False,
  'normalize_reward': False,
  'normalize_advantage': False,
  'reward_clip_range': 10.0,
}
CASES: dict[str, dict[str, Any]] = {
  'trl': {},
  'trl_no_kl': {'beta': 0.0},
  'trl_normalized': {'normalize_advantages': True, 'reward_clip_range': [-1.0, 1.0]},
  'trl0': {},
  'trl0_token_kl': {'token_level_kl': True},
  'trl0_normalized': {'normalize_reward': True, 'normalize_advantage': True},
}


def of_new(settings: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
  """Advantages and loss; a prompt's completions lie side by side."""
  mask = t['mask'].long()
  state: dict[str, Any] = {
    'torch': torch,
    'nanstd': rloo_trainer.nanstd,
    'gather': lambda x: x,
    'device': 'cpu',
    'num_generations': GROUP,
    'rewards_per_func': t['scores'].detach()[:, None],
    'completion_mask': mask,
    'old_per_token_logps': t['old_logprobs'].detach(),
    'ref_per_token_logps': t['ref_logprobs'].detach(),
    'self': SimpleNamespace(reward_weights=torch.ones(1), **settings),
  }
  source = Path(inspect.getfile(rloo_trainer))
  making.statements(source, 'unscorable_mask = ', 'advantages = torch.nan_to_num', state)
  rows, columns = mask.shape
  trainer = SimpleNamespace(
    model=SimpleNamespace(training=True),
    accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    aux_loss_enabled=False,
    _metrics=defaultdict(lambda: defaultdict(list)),
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
      t['logprobs'],
      torch.zeros(rows, columns),
      None,
    ),
    **settings,
  )
  batch = {
    'prompt_ids': torch.zeros(rows, 1, dtype=torch.long),
    'prompt_mask': torch.ones(rows, 1, dtype=torch.long),
    'completion_ids': torch.zeros(rows, columns, dtype=torch.long),
    'completion_mask': mask,
    'advantages': state['advantages'],
    'old_logps': (state['old_per_token_logps'] * mask).sum(1),
  }
  loss = RLOOTrainer._compute_loss(trainer, None, batch)
  return {'advantages': state['advantages'], 'loss': loss}


def of_old(path: Path, settings: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
  """Advantages and loss. That code interleaves prompts; what is returned here is as elsewhere."""
  rows, columns = t['mask'].shape
  order = torch.arange(rows).reshape(-1, GROUP).T.flatten()
  fixed = {name: value.detach()[order] for name, value in t.items()}
  state: dict[str, Any] = {
    'torch': torch,
    'args': SimpleNamespace(rloo_k=GROUP, **settings),
    'responses': torch.zeros(rows, columns, dtype=torch.long),
    'sequence_lengths': fixed['mask'].sum(-1) - 1,
    'logprobs': fixed['old_logprobs'],
    'ref_logprobs': fixed['ref_logprobs'],
    'scores': fixed['scores'],
    'micro_batch_inds': torch.arange(rows),
    'new_logprobs': t['logprobs'][order],
    'INVALID_LOGPROB': 1.0,
  }
  making.statements(path, 'response_idxs = ', 'if args.normalize_advantage', state)
  for name in ('advantage', 'logprobs'):
    making.statements(path, f'mb_{name} = ', f'mb_{name} = ', state)
  making.statements(path, 'new_logprobs = torch.masked_fill', 'loss = pg_loss', state)
  return {'advantages': state['advantages'][torch.argsort(order)], 'loss': state['loss']}


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  rng = np.random.default_rng(11)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'logprobs', 'old_logprobs', 'ref_logprobs', spread=0.1),
    'scores': making.float32(rng.normal(0.5, 1, len(mask))),
  }
  about = {
    'reference': 'huggingface/trl',
    'commit': making.commit(checkout),
    'version': f'{trl.__version__}; 0.15.2 (cases trl0_*)',
    'torch': torch.__version__,
    'function': 'trl.trainer.rloo_trainer: RLOOTrainer._compute_loss, and the advantages of '
    '_generate_and_score_completions; of 0.15.2, RLOOTrainer.train from the masks to the loss',
    'note': f'Rows belong to groups of {GROUP}, side by side.',
  }
  fixture = making.Fixture('rloo', about, inputs)
  t = making.tensors(inputs)
  for case, changes in CASES.items():
    if case.startswith('trl0'):
      settings = {**OLD, **changes}
      outputs = of_old(checkout / 'trl' / 'trainer' / 'rloo_trainer.py', settings, t)
    else:
      settings = {**NEW, **changes}
      outputs = of_new(settings, t)
    hyperparameters = {**settings, 'num_generations': GROUP}
    fixture.differentiate(case, hyperparameters, outputs, {'logprobs': t['logprobs']})
  fixture.save()


if __name__ == '__main__':
  main()
