"""reinforce_pp.npz: OpenRLHF's advantages (REINFORCE++ and others), policy and value losses.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/OpenRLHF/OpenRLHF
  git -C OpenRLHF checkout 3c3be6234e0cb353e76bb8019947db9dfe99fca7
  pip install torch numpy
  python -m tests.golden.make_reinforce_pp OpenRLHF
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

GROUP = 4
DEFAULTS: dict[str, Any] = {
  'estimator': 'reinforce',
  'kl_coef': 0.05,
  'kl_estimator': 'k1',
  'use_kl_loss': False,
  'gamma': 1.0,
  'lambd': 0.95,
  'no_std_norm': False,
  'reward_clip_range': None,
  'clip_eps_low': 0.2,
  'clip_eps_high': 0.2,
  'dual_clip': None,
  'token_level_loss': True,
  'policy_loss_type': 'ppo',
  'value_clip': 0.2,
}
CASES: dict[str, dict[str, Any]] = {
  'reinforce_pp': {},
  'reinforce_pp_discounted': {'gamma': 0.9, 'kl_coef': 0.2, 'reward_clip_range': [-1.0, 1.0]},
  'reinforce_pp_baseline': {'estimator': 'reinforce_baseline'},
  'reinforce_pp_kl_loss': {
    'estimator': 'reinforce_baseline', 'use_kl_loss': True, 'kl_estimator': 'k2'
  },
  'reinforce_pp_no_std': {'no_std_norm': True},
  'sample_level': {'token_level_loss': False},
  'dual_clip': {'dual_clip': 1.5},
  'rloo': {'estimator': 'rloo'},
  'group_norm': {'estimator': 'group_norm', 'use_kl_loss': True, 'kl_estimator': 'k3'},
  'dr_grpo': {'estimator': 'dr_grpo', 'use_kl_loss': True, 'kl_estimator': 'k3'},
  'gspo': {'estimator': 'group_norm', 'policy_loss_type': 'gspo', 'clip_eps_high': 0.3},
  'gae': {'estimator': 'gae', 'gamma': 0.95},
}  # fmt: skip


class Reference:
  """The definitions of one checkout."""

  def __init__(self, checkout: Path) -> None:
    package = checkout / 'openrlhf'
    self.scope: dict[str, Any] = {
      'torch': torch,
      'nn': torch.nn,
      'itertools': itertools,
      'apply_length_penalties': lambda experiences, args: None,
    }
    for name in ('compute_approx_kl', 'compute_reward', 'masked_mean'):
      making.definition(package / 'models' / 'utils.py', name, self.scope)
    for name in ('aggregate_loss', 'PolicyLoss', 'ValueLoss'):
      making.definition(package / 'models' / 'loss.py', name, self.scope)
    source = package / 'trainer' / 'ppo_utils' / 'experience_maker.py'
    names = ('compute_advantages_and_returns', 'get_advantages_and_returns')
    self.methods = {
      name: making.definition(source, f'RemoteExperienceMaker.{name}', self.scope)
      for name in (*names, 'get_cumulative_returns')
    }

  def advantages(self, settings: dict[str, Any], t: dict[str, Any]) -> Any:
    """Advantages and returns `[N, R]`."""
    kl = self.scope['compute_approx_kl'](
      t['old_logprobs'].detach(), t['ref_logprobs'].detach(), settings['kl_estimator']
    )
    rows = len(t['mask'])
    experience = SimpleNamespace(
      index=list(range(rows)),
      rewards=t['scores'].detach(),
      kl=torch.zeros_like(kl) if settings['use_kl_loss'] else kl,
      action_mask=t['mask'].long(),
      values=t['old_values'].detach(),
      info={},
    )
    advantage = SimpleNamespace(
      **{key: settings[key] for key in ('estimator', 'gamma', 'lambd', 'no_std_norm')}
    )
    maker = SimpleNamespace(
      strategy=SimpleNamespace(
        args=SimpleNamespace(
          rollout=SimpleNamespace(n_samples_per_prompt=GROUP),
          algo=SimpleNamespace(advantage=advantage),
          reward=SimpleNamespace(clip_range=settings['reward_clip_range']),
        )
      ),
      kl_ctl=SimpleNamespace(value=settings['kl_coef']),
      advantage_estimator=settings['estimator'],
    )
    for name, method in self.methods.items():
      setattr(maker, name, lambda *args, f=method: f(maker, *args))
    with torch.no_grad():
      maker.compute_advantages_and_returns([experience])
    return experience.advantages, experience.returns

  def outputs(self, settings: dict[str, Any], t: dict[str, Any]) -> dict[str, Any]:
    """Everything that a step of the actor and, for GAE, of the critic computes."""
    advantages, returns = self.advantages(settings, t)
    mask = t['mask'].long()
    names = ('clip_eps_low', 'clip_eps_high', 'dual_clip', 'token_level_loss', 'policy_loss_type')
    policy_loss = self.scope['PolicyLoss'](**{name: settings[name] for name in names})
    policy, clip_ratio, _, _ = policy_loss(
      t['logprobs'], t['old_logprobs'].detach(), advantages, action_mask=mask
    )
    outputs = {
      'advantages': advantages,
      'returns': returns,
      'policy_loss': policy,
      'clip_ratio': clip_ratio,
      'loss': policy,
    }
    if settings['use_kl_loss']:
      kl = self.scope['compute_approx_kl'](
        t['logprobs'], t['ref_logprobs'].detach(), settings['kl_estimator']
      )
      outputs['kl_loss'] = self.scope['aggregate_loss'](kl, mask)
      outputs['loss'] = policy + outputs['kl_loss'] * settings['kl_coef']
    if settings['estimator'] == 'gae':
      value_loss = self.scope['ValueLoss'](clip_eps=settings['value_clip'])
      old = t['old_values'].detach()
      outputs['value_loss'] = value_loss(t['values'], old, returns, action_mask=mask)
      outputs['loss'] = policy + outputs['value_loss']
    return outputs


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  rng = np.random.default_rng(12)
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
    'reference': 'OpenRLHF/OpenRLHF',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'RemoteExperienceMaker.compute_advantages_and_returns; models/loss.py: '
    'PolicyLoss, ValueLoss, aggregate_loss; models/utils.py: compute_approx_kl, compute_reward',
    'note': f'Rows belong to groups of {GROUP}, side by side. loss = policy_loss + kl_coef * '
    'kl_loss where the KL is in the loss; case gae: policy_loss + value_loss. That code computes '
    'the KL in float32.',
  }
  fixture = making.Fixture('reinforce_pp', about, inputs)
  reference = Reference(checkout)
  t = making.tensors(inputs)
  leaves = {name: t[name] for name in ('logprobs', 'values')}
  for case, changes in CASES.items():
    settings = {**DEFAULTS, **changes}
    hyperparameters = {**settings, 'num_generations': GROUP}
    fixture.differentiate(case, hyperparameters, reference.outputs(settings, t), leaves)
  fixture.save()


if __name__ == '__main__':
  main()
