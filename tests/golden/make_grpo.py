"""grpo.npz: TRL's group-relative advantages and `GRPOTrainer._compute_loss`, on stand-ins.

Set-up: a virtual environment with torch for CPU, then

  pip install trl==1.16.0
  python -m tests.golden.make_grpo
"""

import inspect
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.golden import making

GROUP = 4  # Completions of one prompt, side by side.
DEFAULTS = {
  'loss_type': 'grpo',
  'scale_rewards': 'group',
  'beta': 0.0,
  'epsilon_low': 0.2,
  'epsilon_high': 0.2,
  'delta': None,
  'importance_sampling_level': 'token',
  'use_bias_correction_kl': False,
  'max_completion_length': 10,
  'off_policy_mask_threshold': None,
  'on_policy': False,
}
CASES: dict[str, dict[str, Any]] = {
  'grpo': {},
  'grpo_kl': {'beta': 0.04},
  'grpo_kl_corrected': {'beta': 0.04, 'use_bias_correction_kl': True},
  'grpo_on_policy': {'beta': 0.04, 'on_policy': True},
  'grpo_scale_batch': {'scale_rewards': 'batch'},
  'grpo_scale_none': {'scale_rewards': 'none'},
  'grpo_two_sided': {'delta': 1.3},
  'bnpo': {'loss_type': 'bnpo', 'beta': 0.04},
  'dr_grpo': {'loss_type': 'dr_grpo', 'scale_rewards': 'none', 'beta': 0.04},
  'dapo': {'loss_type': 'dapo', 'epsilon_high': 0.28},
  'dapo_kl': {'loss_type': 'dapo', 'epsilon_high': 0.28, 'beta': 0.04},
  'gspo': {'importance_sampling_level': 'sequence', 'epsilon_low': 0.1, 'epsilon_high': 0.15},
  'luspo': {'loss_type': 'luspo', 'importance_sampling_level': 'sequence'},
  'cispo': {'loss_type': 'cispo', 'epsilon_high': 1.2},
  'sapo': {'loss_type': 'sapo'},
  'vespo': {'loss_type': 'vespo'},
  'off_policy_mask': {'off_policy_mask_threshold': 0.1},
}
EXTRA = {  # Settings of single losses, at TRL's defaults.
  'sapo_temperature_pos': 1.0,
  'sapo_temperature_neg': 1.05,
  'vespo_k_pos': 2.0,
  'vespo_lambda_pos': 3.0,
  'vespo_k_neg': 3.0,
  'vespo_lambda_neg': 2.0,
}


def advantages_of(scores: torch.Tensor, scale_rewards: str) -> torch.Tensor:
  """The advantages that the trainer makes of scores `[N]`."""
  state: dict[str, Any] = {
    'torch': torch,
    'nanstd': grpo_trainer.nanstd,
    'device': 'cpu',
    'rewards_per_func': scores[:, None],
    'num_generations': GROUP,
    'self': SimpleNamespace(
      multi_objective_aggregation='sum_then_normalize',
      reward_weights=torch.ones(1),
      scale_rewards=scale_rewards,
    ),
  }
  source = Path(inspect.getfile(grpo_trainer))
  making.statements(source, 'unscorable_mask = ', 'advantages = torch.nan_to_num', state)
  return state['advantages']


def loss_of(settings: dict[str, Any], t: dict[str, Any], advantages: torch.Tensor) -> torch.Tensor:
  """The trainer's loss of one batch, that is a whole optimiser step."""
  rows, columns = t['mask'].shape
  own = ('use_bias_correction_kl', 'delta', *EXTRA)
  trainer = SimpleNamespace(
    model=SimpleNamespace(training=True),
    accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    args=SimpleNamespace(steps_per_generation=1, **{k: settings[k] for k in own}),
    aux_loss_enabled=False,
    top_entropy_quantile=1.0,
    current_gradient_accumulation_steps=1,
    use_vllm=False,
    _entropy_bonus_enabled=False,
    _metrics=defaultdict(lambda: defaultdict(list)),
    get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    get_gamma_weights=GRPOTrainer.get_gamma_weights,
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
      t['logprobs'],
      torch.zeros(rows, columns),
      None,
    ),
    **{k: v for k, v in settings.items() if k not in own},
  )
  mask = t['mask'].long()
  batch = {
    'prompt_ids': torch.zeros(rows, 1, dtype=torch.long),
    'prompt_mask': torch.ones(rows, 1, dtype=torch.long),
    'completion_ids': torch.zeros(rows, columns, dtype=torch.long),
    'completion_mask': mask,
    'advantages': advantages,
    'ref_per_token_logps': t['ref_logprobs'].detach(),
    'num_items_in_batch': mask.sum(),
  }
  if not settings['on_policy']:
    batch['old_per_token_logps'] = t['old_logprobs'].detach()
  return GRPOTrainer._compute_loss(trainer, None, batch)


def main() -> None:
  rng = np.random.default_rng(10)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'logprobs', 'old_logprobs', 'ref_logprobs', spread=0.2),
    'scores': making.float32(rng.normal(0.5, 1, len(mask))),
  }
  about = {
    'reference': 'huggingface/trl',
    'version': trl.__version__,
    'torch': torch.__version__,
    'function': 'trl.trainer.grpo_trainer: GRPOTrainer._compute_loss, and the advantages of '
    '_generate_and_score_completions',
    'note': f'Rows belong to groups of {GROUP}, side by side. on_policy: the old log-probs are '
    "the policy's own, detached.",
  }
  fixture = making.Fixture('grpo', about, inputs)
  t = making.tensors(inputs)
  for case, changes in CASES.items():
    settings = {**DEFAULTS, **EXTRA, **changes}
    advantages = advantages_of(t['scores'].detach(), settings['scale_rewards'])
    outputs = {'advantages': advantages, 'loss': loss_of(settings, t, advantages)}
    hyperparameters = {
      k: v for k, v in settings.items() if k not in EXTRA or k.startswith(settings['loss_type'])
    }
    hyperparameters['num_generations'] = GROUP
    fixture.differentiate(case, hyperparameters, outputs, {'logprobs': t['logprobs']})
  fixture.save()


if __name__ == '__main__':
  main()
