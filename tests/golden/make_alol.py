"""alol.npz: advantage-leftover-lunch RL by its authors, with their baselines.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/abaheti95/LoL-RL
  git -C LoL-RL checkout 9f8d81660bfa0bad17ae5d7835185987f028812e
  pip install torch numpy
  python -m tests.golden.make_alol LoL-RL
"""

from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

DEFAULTS = {'ppo_clip': 0.9, 'kl_beta': 0.0}
CASES: dict[str, dict[str, Any]] = {
  'nll': {'algorithm': 'nll'},
  'wbc': {'algorithm': 'wbc'},
  'r_gold': {'algorithm': 'r_gold'},
  'r_lol': {'algorithm': 'r_lol'},
  'r_lol_kl': {'algorithm': 'r_lol', 'ppo_clip': 0.0, 'kl_beta': 0.1},
  'a_lol': {'algorithm': 'a_lol'},
  'a_lol_unclipped': {'algorithm': 'a_lol', 'ppo_clip': 0.0},
  'a_lol_kl': {'algorithm': 'a_lol', 'ppo_clip': 0.0, 'kl_beta': 0.1},
  'a_lol_seq': {'algorithm': 'a_lol_seq'},
  'a_lol_seq_tight': {'algorithm': 'a_lol_seq', 'ppo_clip': 0.2},
  'a_lol_seq_unclipped': {'algorithm': 'a_lol_seq', 'ppo_clip': None},
  'a_lol_ref_free': {'algorithm': 'a_lol_ref_free'},
}


def loss_of(checkout: Path, settings: dict[str, Any], t: dict[str, Any]) -> torch.Tensor:
  """The loss that the training script would differentiate."""
  rows, columns = t['mask'].shape
  ones = torch.ones(rows, columns, dtype=torch.long)
  reference = torch.nn.functional.pad(
    making.binary_logits(t['ref_logprobs'].detach()), (0, 0, 0, 1)
  )

  def baseline(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(logits=reference, hidden_states=[torch.zeros(rows, 2, 1)])

  model = SimpleNamespace(device='cpu')
  totals: dict[str, Any] = defaultdict(float)
  scope: dict[str, Any] = {
    'torch': torch,
    'np': np,
    'F': torch.nn.functional,
    'deepcopy': deepcopy,
    'script_args': SimpleNamespace(**settings),
    'model': model,
    'baseline_model': type('Baseline', (), {'device': 'cpu', '__call__': baseline})(),
    'best_value_function_model': lambda hidden: t['state_values'].detach(),
    'current_batch_prefixes_inputs': {'input_ids': torch.ones(rows, 1)},
    'input_ids': ones,
    'attention_mask': ones,
    'labels': ones,
    'response_mask': t['mask'].long(),
    'resp_logits': making.binary_logits(t['policy_logprobs']),
    'batch_rewards': t['rewards'].detach().numpy(),
    'batch_advantages': (t['rewards'] - t['state_values']).clamp(min=0).detach().numpy(),
    'batch_suffix_indices': [0] * rows,
    'total_suffix_distribution': totals,
    'step': 0,
  }
  for name in ('IS', 'reward', 'advantage', 'kl_penalty', 'alol_loss', 'rlol_loss'):
    scope[f'total_{name}'] = 0.0
  for name in ('with_IS', 'without_IS', 'before_reward'):
    scope[f'total_per_resp_loss_{name}'] = 0.0
  making.definition(checkout / 'utils' / 'utils.py', 'reduce_sum', scope)
  script = checkout / 'lolrl_qlora_llama_hh.py'
  branches = "if script_args.algorithm == 'nll':\n    per_response_loss"
  making.statements(script, 'resp_log_probs = ', branches, scope)
  return scope['loss']


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  rng = np.random.default_rng(13)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'policy_logprobs', 'ref_logprobs', spread=0.2),
    'rewards': making.float32(rng.uniform(0, 1, len(mask))),
    'state_values': making.float32(rng.uniform(0.1, 0.7, len(mask))),
  }
  about = {
    'reference': 'abaheti95/LoL-RL',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'lolrl_qlora_llama_hh.py: the branches on script_args.algorithm of its loop',
    'note': 'Advantages are max(0, rewards - state_values) in every a_lol case.',
  }
  fixture = making.Fixture('alol', about, inputs)
  t = making.tensors(inputs)
  for case, changes in CASES.items():
    settings = {**DEFAULTS, **changes}
    outputs = {'loss': loss_of(checkout, settings, t)}
    leaves = {'policy_logprobs': t['policy_logprobs']}
    fixture.differentiate(case, settings, outputs, leaves)
  fixture.save()


if __name__ == '__main__':
  main()
