"""dpo_trl.npz: TRL's losses of DPO and of online DPO, run on stand-ins for the trainers.

Set-up: a virtual environment with torch for CPU, then

  pip install trl==1.16.0
  python -m tests.golden.make_dpo_trl
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer

from tests.golden import making

DEFAULTS = {
  'beta': 0.1,
  'label_smoothing': 0.0,
  'f_divergence_type': 'reverse_kl',
  'f_alpha_divergence_coef': 0.5,
  'ld_alpha': None,
}
CASES: dict[str, dict[str, Any]] = {
  'sigmoid': {},
  'hinge': {'beta': 0.3},
  'ipo': {'beta': 0.2},
  'robust': {'beta': 0.3, 'label_smoothing': 0.1},
  'sigmoid_norm': {'beta': 2.0},
  'exo_pair': {'beta': 0.3, 'label_smoothing': 1e-3},
  'nca_pair': {'beta': 0.3},
  'bco_pair': {'beta': 0.3},
  'sppo_hard': {'beta': 0.3},
  'aot': {'beta': 0.3, 'label_smoothing': 0.1},
  'aot_unpaired': {'beta': 0.3},
  'apo_zero': {'beta': 0.3},
  'apo_down': {'beta': 0.3},
  'discopop': {'beta': 0.3},
  'sft': {},
  'sigmoid_forward_kl': {'beta': 0.3, 'f_divergence_type': 'forward_kl'},
  'sigmoid_js_divergence': {'beta': 0.3, 'f_divergence_type': 'js_divergence'},
  'sigmoid_alpha_divergence': {'beta': 0.3, 'f_divergence_type': 'alpha_divergence'},
  'sigmoid_length_desensitised': {'beta': 0.3, 'ld_alpha': 0.5},
}
JUDGE_REWARDS = ((0.5, 0.1), (-0.2, 0.9), (0.3, 0.3), (1.0, -1.0), (0.0, 2.0), (0.7, 0.6))
COUPLED = ('aot', 'aot_unpaired', 'sft')  # A comparison's loss depends on the others of its batch.


def loss_of(
  settings: dict[str, Any], policy: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
  """The trainer's loss of comparisons `[B, 2, R]`."""
  # TRL stacks all chosen above all rejected responses, and its language-model head gives log-probs
  # that are 0 outside completions. One prompt token stands before each response.
  policy, ref, mask = (x.transpose(0, 1).reshape(-1, x.shape[-1]) for x in (policy, ref, mask))

  def model(logprobs: torch.Tensor) -> Any:
    zeros = torch.zeros_like(logprobs)
    return lambda **kwargs: SimpleNamespace(
      log_probs=logprobs * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )

  trainer = SimpleNamespace(
    model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
    ref_model=model(ref),
    accelerator=SimpleNamespace(device='cpu', gather=lambda x: x, gather_for_metrics=lambda x: x),
    aux_loss_enabled=False,
    precompute_ref_logps=False,
    loss_weights=[1.0],
    use_weighting=False,
    args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    _metrics=defaultdict(lambda: defaultdict(list)),
    _total_train_tokens=0,
    _tp_size=1,
    **settings,
  )
  completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
  batch = {
    'input_ids': torch.zeros_like(completion_mask),
    'attention_mask': torch.ones_like(completion_mask),
    'completion_mask': completion_mask,
  }
  return DPOTrainer._compute_loss(trainer, model(policy), batch, False)


def online(settings: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
  """The loss of online DPO, whose pairs are ordered by the rewards of the two completions."""
  stacked = {k: v.transpose(0, 1).flatten(0, 1) for k, v in t.items()}
  state: dict[str, Any] = {
    'torch': torch,
    'F': torch.nn.functional,
    'device': 'cpu',
    'batch_size': len(t['mask']),
    'rewards': stacked['judge_rewards'].detach(),
    'logprobs': stacked['policy_logprobs'],
    'ref_logprobs': stacked['ref_logprobs'].detach(),
    'completion_mask': stacked['mask'].long(),
    'self': SimpleNamespace(
      beta=settings['beta'], args=SimpleNamespace(loss_type=settings['loss_type'])
    ),
  }
  folder = Path(trl.__file__).parent / 'experimental' / 'online_dpo'
  making.statements(folder / 'online_dpo_trainer.py', 'first_half, ', 'loss = ', state)
  return {name: state[name] for name in ('losses', 'loss')}


def main() -> None:
  inputs = making.pair_inputs(0)
  inputs['judge_rewards'] = making.float32(JUDGE_REWARDS)
  about = {
    'reference': 'huggingface/trl',
    'version': trl.__version__,
    'torch': torch.__version__,
    'function': 'trl.trainer.dpo_trainer.DPOTrainer._compute_loss; '
    'trl.experimental.online_dpo, OnlineDPOTrainer.training_step from the rewards to the loss',
    'note': 'losses: the trainer run on one comparison at a time; absent where they are coupled. '
    'Cases online_*: judge_rewards say which of the two is preferred, of a tie the first.',
  }
  fixture = making.Fixture('dpo_trl', about, inputs)
  t = making.tensors(inputs)
  for case, changes in CASES.items():
    loss_type = 'sigmoid' if case.startswith('sigmoid_') and case != 'sigmoid_norm' else case
    settings = {**DEFAULTS, **changes, 'loss_types': [loss_type]}
    # TRL's clamp of the alpha divergence knows no float64.
    dtype = torch.float32 if 'alpha_divergence' in case else torch.float64
    data = [t['policy_logprobs'].to(dtype), t['ref_logprobs'].detach().to(dtype), t['mask']]
    outputs = {'loss': loss_of(settings, *data)}
    if case not in COUPLED:
      rows = [loss_of(settings, *(x[i : i + 1] for x in data)) for i in range(len(t['mask']))]
      outputs['losses'] = torch.stack(rows)
    hyperparameters = {k: v for k, v in settings.items() if k != 'loss_types'}
    hyperparameters['loss_type'] = loss_type
    fixture.differentiate(case, hyperparameters, outputs, {'policy_logprobs': t['policy_logprobs']})
  for loss_type, beta in (('sigmoid', 0.3), ('ipo', 0.2)):
    settings = {'loss_type': loss_type, 'beta': beta}
    leaves = {'policy_logprobs': t['policy_logprobs']}
    fixture.differentiate(f'online_{loss_type}', settings, online(settings, t), leaves)
  fixture.save()


if __name__ == '__main__':
  main()
