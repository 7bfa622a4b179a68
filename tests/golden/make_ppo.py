"""ppo.npz: rewards, advantages and losses of PPO as in the N+ details and in TRL 1.9.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/vwxyzjn/summarize_from_feedback_details nplus
  git -C nplus checkout ee77a9abc31f5338365ee087945c5bcafac7f1ca
  git clone --branch v1.9.0 https://github.com/huggingface/trl
  pip install torch numpy
  python -m tests.golden.make_ppo nplus trl
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

DEFAULTS = {
  'kl_coef': 0.05,
  'kl_estimator': 'k1',
  'whiten_rewards': False,
  'gamma': 1.0,
  'lam': 0.95,
  'cliprange': 0.2,
  'cliprange_value': 0.2,
  'vf_coef': 0.1,
}
CASES: dict[str, dict[str, Any]] = {
  'nplus': {},
  'nplus_whitened': {'whiten_rewards': True},
  'nplus_discounted': {'kl_coef': 0.2, 'gamma': 0.9, 'lam': 0.8},
  'trl': {},
  'trl_whitened': {'whiten_rewards': True, 'kl_coef': 0.2},
  'trl_k3': {'kl_estimator': 'k3', 'kl_coef': 0.2},
}
STATISTICS = ('masked_mean', 'masked_var', 'masked_whiten')


def compute(path: Path, settings: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
  """All names of the reference's training step, on one minibatch of all rows."""
  fixed = {name: value.detach() for name, value in t.items()}
  rows, _ = t['mask'].shape
  state: dict[str, Any] = {
    'torch': torch,
    'accelerator': SimpleNamespace(print=lambda *args: None),
    'empty_cache': lambda: None,
    'args': SimpleNamespace(**settings, ppo=SimpleNamespace(**settings)),
    'responses': torch.zeros_like(t['mask'], dtype=torch.long),
    'query_responses': torch.zeros(rows, 0),
    'sequence_lengths': t['mask'].sum(-1) - 1,  # Position of the last token.
    'logprobs': fixed['old_logprobs'],
    'ref_logprobs': fixed['ref_logprobs'],
    'values': fixed['old_values'],
    'scores': fixed['scores'],
    'micro_batch_inds': torch.arange(rows),
    'context_length': 1,
    'new_logprobs': t['logprobs'],
    'vpred_temp': torch.nn.functional.pad(t['values'], (0, 1))[..., None],
  }
  making.statements(path, 'INVALID_LOGPROB', 'INVALID_LOGPROB', state)
  for name in STATISTICS:
    making.definition(path, name, state)
  first = 'sequence_lengths_p1' if 'args.ppo' in path.read_text() else 'response_idxs'
  making.statements(path, first, 'advantages = torch.masked_fill', state)
  for name in ('return', 'advantage', 'values', 'logprobs'):
    making.statements(path, f'mb_{name} = ', f'mb_{name} = ', state)
  making.statements(path, 'new_logprobs = torch.masked_fill', 'loss = ', state)
  return state


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('nplus', type=Path)
  parser.add_argument('trl', type=Path)
  arguments = parser.parse_args()
  sources = {
    'nplus': arguments.nplus / 'summarize_from_feedback_details' / 'ppo.py',
    'trl': arguments.trl / 'trl' / 'experimental' / 'ppo' / 'ppo_trainer.py',
  }
  rng = np.random.default_rng(8)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  values = rng.normal(0, 1, mask.shape)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'logprobs', 'old_logprobs', 'ref_logprobs', spread=0.2),
    'values': making.float32(values + rng.normal(0, 0.3, mask.shape)),
    'old_values': making.float32(values),
    'scores': making.float32(rng.normal(0.5, 1, len(mask))),
  }
  about = {
    'reference': 'vwxyzjn/summarize_from_feedback_details; huggingface/trl',
    'commit': f'{making.commit(arguments.nplus)}; {making.commit(arguments.trl)}',
    'version': 'trl 1.9.0',
    'torch': torch.__version__,
    'function': 'ppo.py and trl/experimental/ppo/ppo_trainer.py: from the masks to the loss',
    'note': 'Values are read at one position more than the mask has (`mask_p1`), where the score '
    'stands too: the one after the last token, if the row has one.',
  }
  fixture = making.Fixture('ppo', about, inputs)
  t = making.tensors(inputs)
  leaves = {name: t[name] for name in ('logprobs', 'values')}
  for case, changes in CASES.items():
    settings = {**DEFAULTS, **changes}
    state = compute(sources[case.partition('_')[0]], settings, t)
    outputs = {name: state[name] for name in ('rewards', 'advantages', 'returns')}
    outputs |= {name: state[name] for name in ('pg_loss', 'vf_loss', 'vf_clipfrac', 'loss')}
    outputs['mask_p1'] = ~state['padding_mask_p1']
    fixture.differentiate(case, settings, outputs, leaves)
  fixture.save()


if __name__ == '__main__':
  main()
