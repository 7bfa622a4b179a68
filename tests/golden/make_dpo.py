"""dpo.npz: the DPO authors' `preference_loss`, with label smoothing, IPO, and without reference.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/eric-mitchell/direct-preference-optimization
  git -C direct-preference-optimization checkout f8b8c0f49dc92a430bae41585f9d467d3618fe2f
  pip install torch numpy
  python -m tests.golden.make_dpo direct-preference-optimization
"""

import torch

from tests.golden import making

CASES = {
  'sigmoid': {'beta': 0.1},
  'sigmoid_beta_0.5': {'beta': 0.5},
  'cdpo': {'beta': 0.3, 'label_smoothing': 0.1},
  'ipo': {'beta': 0.2, 'ipo': True},
  'reference_free': {'beta': 0.3, 'reference_free': True},
}


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  scope = {'torch': torch, 'F': torch.nn.functional}
  preference_loss = making.definition(checkout / 'trainers.py', 'preference_loss', scope)
  inputs = making.pair_inputs(0)
  about = {
    'reference': 'eric-mitchell/direct-preference-optimization',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'trainers.py: preference_loss',
    'note': 'Given token sums, as _get_batch_logps makes them; loss is the mean over comparisons.',
  }
  fixture = making.Fixture('dpo', about, inputs)
  t = making.tensors(inputs)
  policy, reference = ((t[k] * t['mask']).sum(-1) for k in ('policy_logprobs', 'ref_logprobs'))
  for case, settings in CASES.items():
    losses, chosen, rejected = preference_loss(*policy.T, *reference.T, **settings)
    outputs = {
      'losses': losses,
      'loss': losses.mean(),
      'implicit_rewards': torch.stack([chosen, rejected], -1),
    }
    hyperparameters = {'label_smoothing': 0.0, 'ipo': False, 'reference_free': False, **settings}
    fixture.differentiate(case, hyperparameters, outputs, {'policy_logprobs': t['policy_logprobs']})
  fixture.save()


if __name__ == '__main__':
  main()
