"""unlikelihood.npz: unlikelihood training by its authors, of candidate tokens and of sequences.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/facebookresearch/unlikelihood_training
  git -C unlikelihood_training checkout 944465589c0fab534fe6d14a5db2850ddeee43ce
  pip install torch numpy
  python -m tests.golden.make_unlikelihood unlikelihood_training
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

PADDING = 0
VOCABULARY = 6
CANDIDATES = {'candidates_one_row': (1, 1.0), 'candidates_two_rows': (2, 0.5)}


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  rng = np.random.default_rng(14)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  shape = (2, making.COLUMNS)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'policy_logprobs'),
    'logits': making.float32(rng.normal(size=(*shape, VOCABULARY))),
    'tokens': rng.integers(1, VOCABULARY, shape),
  }
  about = {
    'reference': 'facebookresearch/unlikelihood_training',
    'commit': making.commit(checkout),
    'torch': torch.__version__,
    'function': 'custom/candidate_penalty_ce_loss.py and custom/sequence_penalty_loss.py: forward',
    'note': 'loss is the sum that the code returns over the sample size it divides gradients by. '
    f'Token {PADDING} is padding; the candidates of a row go on from those of the row before.',
  }
  fixture = making.Fixture('unlikelihood', about, inputs)
  t = making.tensors(inputs)
  scope: dict[str, Any] = {'torch': torch, 'F': torch.nn.functional}
  source = checkout / 'custom' / 'candidate_penalty_ce_loss.py'
  for case, (rows, alpha) in CANDIDATES.items():
    logits = t['logits'][:rows]
    model = SimpleNamespace(get_normalized_probs=lambda output, log_probs: output.log_softmax(-1))
    state = {
      **scope,
      'model': model,
      'net_output': logits,
      'target': t['tokens'][:rows].flatten(),
      'self': SimpleNamespace(padding_idx=PADDING, rank_alpha=alpha, candidate_type='prev_context'),
    }
    making.statements(source, 'lprobs = model', 'loss = mle_loss', state)
    tokens = state['target'].numel()
    outputs = {
      'loss': state['loss'] / tokens,
      'mle_loss': state['mle_loss'] / tokens,
      'unlikelihood': state['custom_loss'] / tokens,
      'candidates': state['negative_targets'].reshape(rows, -1, VOCABULARY),
    }
    hyperparameters = {'rank_alpha': alpha, 'rows': rows}
    fixture.differentiate(case, hyperparameters, outputs, {'logits': t['logits']})
  source = checkout / 'custom' / 'sequence_penalty_loss.py'
  state = {
    **scope,
    'pred_lprobs': t['policy_logprobs'].reshape(-1, 1),
    'pred_toks': t['mask'].long(),
    'mask': t['mask'].double(),
    'batch': t['mask'],
  }
  making.statements(source, 'one_minus_probs = ', 'sample_size = ', state)
  outputs = {'loss': state['loss'] / state['sample_size'], 'total': state['loss']}
  fixture.differentiate('sequence', {}, outputs, {'policy_logprobs': t['policy_logprobs']})
  fixture.save()


if __name__ == '__main__':
  main()
