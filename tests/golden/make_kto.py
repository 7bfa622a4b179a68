"""kto.npz: the KTO authors' loss (HALOs) and TRL's, with the reference point as they estimate it.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/ContextualAI/HALOs
  git -C HALOs checkout 4831988636b4cbc1c30c0bce78df568cf0f8103b
  pip install torch trl==1.16.0
  python -m tests.golden.make_kto HALOs
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer.kto_trainer import KTOTrainer

from tests.golden import making

DESIRABLE = (True, False, True, True, False, True, False, False)
CASES: dict[str, dict[str, Any]] = {
  'beta_0.1': {'beta': 0.1, 'desirable_weight': 1.0, 'undesirable_weight': 1.0},
  'weighted': {'beta': 0.5, 'desirable_weight': 1.33, 'undesirable_weight': 0.75},
  # Mismatched log-ratios with policy and reference exchanged: the estimate is clamped or not.
  'other_sign': {'beta': 0.5, 'desirable_weight': 1.0, 'undesirable_weight': 1.0},
}


def halos(loss: Any, rewards: Any, settings: Any, t: Any, policy: Any, ref: Any, kl: Any) -> Any:
  """(losses of the rows in their order, reference point)."""
  config = SimpleNamespace(humanline=False, loss=SimpleNamespace(**settings))
  trainer = SimpleNamespace(
    config=config,
    policy_dtype=torch.float64,
    accelerator=SimpleNamespace(device='cpu', reduce=lambda x, reduction: x),
  )
  trainer.get_sequence_rewards = lambda *args: rewards(trainer, *args)
  good = t['desirable']
  policy_kl, ref_kl = kl
  result = loss(trainer, {}, policy[good], policy[~good], policy_kl, ref[good], ref[~good], ref_kl)
  order = torch.argsort(torch.cat([torch.nonzero(good), torch.nonzero(~good)])[:, 0])
  return result[0][order], result[3]


def of_trl(loss_type: str, settings: Any, t: Any, policy: Any, ref: Any, kl: Any) -> Any:
  """(loss, reference point)."""
  metrics: Any = defaultdict(lambda: defaultdict(list))
  masks = {'': t['mask'], 'KL_': t['mismatched_mask']}

  def model(ordinary: torch.Tensor, mismatched: torch.Tensor) -> Any:
    def apply(**kwargs: Any) -> Any:
      zeros = torch.zeros_like(ordinary)
      return SimpleNamespace(
        log_probs=mismatched if kwargs.get('input_ids') is mismatched_ids else ordinary,
        entropy=zeros,
        mean_logits=zeros,
      )

    return apply

  batch: Any = {'label': t['desirable']}
  for prefix, mask in masks.items():
    padded = torch.nn.functional.pad(mask.long(), (1, 0))
    batch[f'{prefix}completion_mask'] = padded
    batch[f'{prefix}input_ids'] = torch.zeros_like(padded)
    batch[f'{prefix}attention_mask'] = torch.ones_like(padded)
  mismatched_ids = batch['KL_input_ids']
  trainer = SimpleNamespace(
    model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
    ref_model=model(ref, kl[1]),
    accelerator=SimpleNamespace(device='cpu', gather=lambda x: x, gather_for_metrics=lambda x: x),
    args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    aux_loss_enabled=False,
    precompute_ref_logps=False,
    calculate_KL=loss_type == 'kto',
    loss_type=loss_type,
    _metrics=metrics,
    _total_train_tokens=0,
    _tp_size=1,
    **settings,
  )
  trainer._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(trainer, *args)
  loss = KTOTrainer._compute_loss(trainer, model(policy, kl[0]), batch, False)
  return loss, torch.tensor(metrics['train']['kl'][0])


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  source = checkout / 'train' / 'trainers.py'
  scope: dict[str, Any] = {'torch': torch, 'F': torch.nn.functional}
  kto_loss = making.definition(source, 'KTOTrainer.loss', dict(scope))
  rewards = making.definition(source, 'BasicTrainer.get_sequence_rewards', dict(scope))
  rng = np.random.default_rng(3)
  mask, mismatched = (making.prefix_mask(n) for n in (making.ROW_LENGTHS, (3, 7, 1, 4, 6, 2, 5, 1)))
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'policy_logprobs', 'ref_logprobs'),
    'desirable': np.array(DESIRABLE),
    'mismatched_mask': mismatched,
    **making.logprobs(rng, mismatched, 'mismatched_policy_logprobs', 'mismatched_ref_logprobs'),
  }
  about = {
    'reference': 'ContextualAI/HALOs; huggingface/trl',
    'commit': making.commit(checkout),
    'version': f'trl {trl.__version__}',
    'torch': torch.__version__,
    'function': 'train/trainers.py: KTOTrainer.loss; trl KTOTrainer._compute_loss',
    'note': 'kl is the reference point that each made of the mismatched log-probs; in the cases '
    'other_sign the mismatched policy and reference were exchanged.',
  }
  fixture = making.Fixture('kto', about, inputs)
  t = making.tensors(inputs)
  leaves = {'policy_logprobs': t['policy_logprobs']}
  policy, ref = (t[k] * t['mask'] for k in ('policy_logprobs', 'ref_logprobs'))
  pair = [
    (t[f'mismatched_{k}_logprobs'] * t['mismatched_mask']).detach() for k in ('policy', 'ref')
  ]
  for case, settings in CASES.items():
    kl = pair[::-1] if case == 'other_sign' else pair
    data = (settings, t, policy, ref.detach(), kl)
    losses, point = halos(kto_loss, rewards, *data)
    outputs = {'losses': losses, 'loss': losses.mean(), 'kl': point}
    fixture.differentiate(f'halos_{case}', settings, outputs, leaves)
    loss, point = of_trl('kto', *data)
    fixture.differentiate(f'trl_{case}', settings, {'loss': loss, 'kl': point}, leaves)
  loss, _ = of_trl('apo_zero_unpaired', *data)
  fixture.differentiate('trl_apo_zero_unpaired', settings, {'loss': loss}, leaves)
  fixture.save()


if __name__ == '__main__':
  main()
