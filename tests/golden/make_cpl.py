"""cpl.npz: contrastive preference learning, on comparisons and on all pairs of scored segments.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/jhejna/cpl
  git -C cpl checkout b333667bc2952c8b8cc968662d1bc3e67e108b8e
  pip install torch numpy
  python -m tests.golden.make_cpl cpl
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

LABELS = (1.0, 1.0, 0.5, 0.0, 1.0, 0.0)  # Probability that the first is preferred.
SCORES = (0.3, -1.2, 2.5, 0.9, -0.4, 1.7, 0.1, -2.0)
SETTINGS: dict[str, dict[str, Any]] = {
  'cpl': {'alpha': 0.1, 'contrastive_bias': 0.5},
  'cpl_bias_0.75': {'alpha': 0.2, 'contrastive_bias': 0.75},
  'cpl_bias_1': {'alpha': 0.1, 'contrastive_bias': 1.0},
  'cpl_bc_all': {'alpha': 0.1, 'contrastive_bias': 0.5, 'bc_coeff': 0.5},
  'cpl_bc_pos': {'alpha': 0.1, 'contrastive_bias': 0.5, 'bc_coeff': 0.5, 'bc_data': 'pos'},
  'cpl_kl': {'alpha': 0.2, 'contrastive_bias': 0.75},
  'dense': {'alpha': 0.1, 'contrastive_bias': 0.5},
  'dense_bias_0.75': {'alpha': 0.1, 'contrastive_bias': 0.75},
  'dense_bias_1': {'alpha': 0.1, 'contrastive_bias': 1.0},
  'dense_kl': {'alpha': 0.2, 'contrastive_bias': 0.75},
}


class Given(torch.distributions.Distribution):
  """The policy's stand-in: log-probs that were chosen beforehand."""

  def __init__(self, logprobs: torch.Tensor) -> None:
    super().__init__(validate_args=False)
    self.logprobs = logprobs

  def log_prob(self, value: torch.Tensor) -> torch.Tensor:
    return self.logprobs


def network(logprobs: torch.Tensor) -> Any:
  """Encoder and actor as the algorithms use them."""
  return SimpleNamespace(encoder=lambda x: x, actor=lambda x: Given(logprobs), eval=lambda: None)


def terms(
  method: Any,
  settings: dict[str, Any],
  logprobs: list[torch.Tensor],
  *,
  preference: torch.Tensor | None = None,
  scores: torch.Tensor | None = None,
) -> Any:
  """(CPL loss, BC loss, accuracy) of the policy's and the reference's masked log-probs."""
  batch = {k: torch.zeros(1) for k in ('obs', 'action', 'obs_1', 'obs_2', 'action_1', 'action_2')}
  if preference is not None:
    # The code stacks all first segments above all second ones; its labels are for the second.
    logprobs = [x.transpose(0, 1).reshape(-1, making.COLUMNS) for x in logprobs]
    batch['label'] = 1 - preference
  else:
    assert scores is not None
    batch['score'] = scores
  policy, reference = (network(x) for x in logprobs)
  settings = {'bc_coeff': 0.0, 'bc_data': 'all', **settings}
  return method(SimpleNamespace(network=policy, reference_network=reference, **settings), batch)


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  folder = checkout / 'research' / 'algs'
  scope: dict[str, Any] = {'torch': torch}
  for name in ('biased_bce_with_logits', 'biased_bce_with_scores'):
    making.definition(folder / 'cpl.py', name, scope)
  method = {
    False: making.definition(folder / 'cpl.py', 'CPL._get_cpl_loss', dict(scope)),
    True: making.definition(folder / 'cpl_kl.py', 'CPL_KL._get_cpl_loss', dict(scope)),
  }
  rng = np.random.default_rng(1)
  rows = making.prefix_mask(making.ROW_LENGTHS)
  rows_logprobs = making.logprobs(rng, rows, 'dense_policy_logprobs', 'dense_ref_logprobs')
  inputs = {
    **making.pair_inputs(2),
    'preference': making.float32(LABELS),
    'dense_mask': rows,
    **rows_logprobs,
    'dense_scores': making.float32(SCORES),
  }
  about = {
    'reference': 'jhejna/cpl',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'research/algs/cpl.py: CPL._get_cpl_loss (and CPL_KL._get_cpl_loss of cpl_kl.py), '
    'with biased_bce_with_logits and biased_bce_with_scores',
    'note': 'The code knows no masks: masked log-probs are given as 0, and bc_loss is its mean '
    'over ALL positions, masked ones counted. Its labels are 1 if the SECOND is preferred; '
    '`preference` here is of the first.',
  }
  fixture = making.Fixture('cpl', about, inputs)
  t = making.tensors(inputs)
  scores, preference = t['dense_scores'].detach(), t['preference'].detach()
  for case, settings in SETTINGS.items():
    dense = case.startswith('dense')
    prefix = 'dense_' if dense else ''
    leaf = t[prefix + 'policy_logprobs']
    masked = [x * t[prefix + 'mask'] for x in (leaf, t[prefix + 'ref_logprobs'].detach())]
    labels = {'scores': scores} if dense else {'preference': preference}
    cpl_loss, bc_loss, accuracy = terms(method['kl' in case], settings, masked, **labels)
    outputs = {'cpl_loss': cpl_loss, 'bc_loss': bc_loss, 'accuracy': accuracy}
    outputs['loss'] = cpl_loss + settings.get('bc_coeff', 0.0) * bc_loss
    if not dense:
      pairs = [[x[i : i + 1] for x in (*masked, preference)] for i in range(len(preference))]
      function = method['kl' in case]
      each = [terms(function, settings, [p, r], preference=y)[0] for p, r, y in pairs]
      outputs['losses'] = torch.stack(each)
    fixture.differentiate(case, settings, outputs, {prefix + 'policy_logprobs': leaf})
  fixture.save()


if __name__ == '__main__':
  main()
