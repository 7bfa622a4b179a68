"""ilql.npz: implicit language Q-learning by trlx and by its authors, and their decoding scores.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/CarperAI/trlx
  git -C trlx checkout 3340c2f3a56d1d14fdd5f13ad575121fa26b6d92
  git clone https://github.com/Sea-Snell/Implicit-Language-Q-Learning ILQL
  git -C ILQL checkout 0dc556150bfbdca5e1e6ee322c9126486c2162f7
  pip install torch numpy
  python -m tests.golden.make_ilql trlx ILQL
"""

import argparse
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import making

F = torch.nn.functional
VOCABULARY = 5
TRLX: dict[str, dict[str, Any]] = {
  'trlx': {'tau': 0.7, 'gamma': 0.99, 'cql_scale': 0.1, 'awac_scale': 1.0, 'beta': 0.0},
  'trlx_weighted': {'tau': 0.8, 'gamma': 0.9, 'cql_scale': 0.5, 'awac_scale': 2.0, 'beta': 0.5},
  'trlx_one_q': {'tau': 0.7, 'gamma': 0.99, 'cql_scale': 0.1, 'awac_scale': 1.0, 'beta': 0.0},
}
AUTHORS: dict[str, dict[str, Any]] = {
  'authors': {},
  'authors_weighted': {'beta': 0.5, 'clip_weight': 1.2, 'cql_temp': 2.0},
  'authors_signs': {'beta': 0.8, 'exp_weights': False},
  'authors_transition': {'beta': 0.5, 'transition_weight': 0.3},
  'authors_margin': {'dm_margin': 0.1, 'dm_loss_weight': 0.5},
}
AUTHORS_DEFAULTS = {
  'tau': 0.7,
  'gamma': 0.99,
  'beta': 0.0,
  'transition_weight': 0.0,
  'clip_weight': None,
  'exp_weights': True,
  'cql_temp': 1.0,
  'dm_margin': 0.0,
  'awac_weight': 1.0,
  'v_loss_weight': 1.0,
  'q_loss_weight': 1.0,
  'cql_loss_weight': 0.1,
  'dm_loss_weight': 0.0,
}
METHODS = (
  'get_weights',
  'awac_loss',
  'get_v_loss',
  'get_q_loss',
  'get_cql_loss',
  'get_dm_loss',
  'get_qvs',
  'get_downstream_rs',
)
PROMPT = 3  # Tokens before the actions, in the authors' cases.


def make_inputs() -> dict[str, np.ndarray]:
  """States 0..R: the last is the one after the last action."""
  rng = np.random.default_rng(7)
  mask = making.prefix_mask(making.ROW_LENGTHS)
  rows, columns = mask.shape
  rewards = np.where(rng.random(mask.shape) < 0.5, rng.normal(size=mask.shape), 0.0)

  def normal(*shape: int) -> np.ndarray:
    return making.float32(rng.normal(size=shape))

  return {
    'mask': mask,
    'actions': rng.integers(0, VOCABULARY, mask.shape),
    'rewards': making.float32(rewards * mask),
    'logits': normal(rows, columns, VOCABULARY),
    'qs': normal(2, rows, columns, VOCABULARY),
    'target_qs': normal(2, rows, columns, VOCABULARY),
    'vs': normal(rows, columns + 1),
    'prompt_logits': normal(rows, PROMPT - 1, VOCABULARY),
  }


def add_trlx(fixture: making.Fixture, source: Path, t: dict[str, Any]) -> None:
  """The loss of `ILQLConfig`, and the scores that `generate` samples from."""
  terms: dict[str, Any] = {}
  batch_type = type('ILQLBatch', (SimpleNamespace,), {})
  scope = {
    'torch': torch,
    'np': np,
    'F': F,
    'reduce': functools.reduce,
    'ILQLBatch': batch_type,
    'get_tensor_stats': lambda *args: {},
    'flatten_dict': lambda stats: terms.update(stats['losses']),
  }
  making.definition(source, 'batched_index_select', scope)
  loss_function = making.definition(source, 'ILQLConfig.loss', scope)
  leaves = {name: t[name] for name in ('logits', 'qs', 'vs')}
  rows, columns = t['mask'].shape
  labels = batch_type(
    dones=F.pad(t['mask'].long(), (0, 1)),  # 1 at states with an action to take.
    input_ids=F.pad(t['actions'], (1, 0)),  # One prompt token.
    actions_ixs=torch.arange(columns).expand(rows, -1),
    rewards=t['rewards'].detach(),
  )
  for case, settings in TRLX.items():
    heads = 1 if case.endswith('one_q') else 2
    output = (
      F.pad(t['logits'], (0, 0, 0, 1)),
      (tuple(t['qs'][:heads]), tuple(t['target_qs'].detach()[:heads]), t['vs'][..., None]),
    )
    loss, _ = loss_function(SimpleNamespace(**settings), output, labels)
    hyperparameters = {**settings, 'two_qs': heads == 2}
    fixture.differentiate(case, hyperparameters, {**terms, 'loss': loss}, leaves)
  making.definition(source, 'topk_mask', scope)
  state: dict[str, Any] = {
    **scope,
    'qs': torch.minimum(*t['target_qs'].detach()[:, :, 0]),
    'vs': t['vs'].detach()[:, :1],
    'logits': t['logits'].detach()[:, 0],
    'beta': 1.5,
    'top_k': VOCABULARY,
  }
  making.statements(source, 'adv = qs - vs', 'pi_top_k =', state)
  # The scores of the first action; the policy is softmax(scores / temperature).
  fixture.add('trlx_decode', {'beta': 1.5}, {'scores': state['pi_top_k']}, {})


def add_authors(fixture: making.Fixture, source: Path, t: dict[str, Any]) -> None:
  """The losses of `PerTokenIQL`, and its scores of tokens."""
  scope: dict[str, Any] = {'torch': torch, 'F': F}
  methods = {n: making.definition(source, f'PerTokenIQL.{n}', dict(scope)) for n in METHODS}
  score = making.definition(
    source, 'PerTokenIQL.score', {**scope, 'process_logits': lambda logits, **kwargs: logits}
  )
  rows, columns = t['mask'].shape
  index = torch.arange(columns) + PROMPT - 1
  index = torch.where(t['mask'], index, 0)  # Padded as its collator pads.
  inputs = {
    'tokens': F.pad(t['actions'], (PROMPT, 0)),
    'attn_mask': F.pad(t['mask'].long(), (PROMPT, 0), value=1),
    'state_idxs': F.pad(index, (0, 1)),
    'action_idxs': index,
    'rewards': t['rewards'].detach(),
    'terminals': 1 - F.pad(t['mask'].long(), (0, 1)),
  }
  # Its gather of tokens reads position 0 where the index is padded; the masks hide that.
  output = {
    'model_outputs': None,
    'vs': t['vs'],
    'target_vs': t['vs'],
    'qs': tuple(t['qs']),
    'target_qs': torch.minimum(*t['target_qs'].detach()),
    'logits': F.pad(torch.cat([t['prompt_logits'], t['logits']], 1), (0, 0, 0, 1)),
  }

  class Model(SimpleNamespace):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
      return output

  leaves = {name: t[name] for name in ('logits', 'qs', 'vs', 'prompt_logits')}
  for case, changes in AUTHORS.items():
    settings = {**AUTHORS_DEFAULTS, **changes}
    # Its weights have the default type, which must be that of their source: signs are float32.
    torch.set_default_dtype(torch.float64 if settings['exp_weights'] else torch.float32)
    model = Model(device='cpu', double_q=True, prepare_inputs=lambda items: inputs, **settings)
    for name, method in methods.items():
      setattr(model, name, lambda *a, f=method, m=model, **k: f(m, *a, **k))
    found = model.get_qvs(None)
    state: dict[str, Any] = {
      **scope, **settings, **found, 'self': model, 'mc_returns': False, 'logs': {}, 'n': 0,
      'get_qvs_outputs': found,
    }  # fmt: skip
    making.statements(source, 'rs_downstream = ', 'loss = ', state)
    terms = ('token_loss', 'v_loss', 'q_loss', 'cql_loss', 'dm_loss', 'loss')
    outputs = {name: state[name] for name in terms}
    hyperparameters = {**settings, 'prompt_tokens': PROMPT}
    fixture.differentiate(case, hyperparameters, outputs, leaves)
  torch.set_default_dtype(torch.float64)
  scores, _ = score(
    model, inputs['tokens'], inputs['attn_mask'], inputs['state_idxs'], inputs['action_idxs'],
    beta=1.5, exp_weights=True, include_logits=True,
  )  # fmt: skip
  scores = scores[:, PROMPT - 1 : PROMPT]
  fixture.add('authors_decode', {'beta': 1.5}, {'scores': scores[:, 0]}, {})


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('trlx', type=Path)
  parser.add_argument('authors', type=Path)
  arguments = parser.parse_args()
  inputs = make_inputs()
  about = {
    'reference': 'CarperAI/trlx; Sea-Snell/Implicit-Language-Q-Learning',
    'commit': f'{making.commit(arguments.trlx)}; {making.commit(arguments.authors)}',
    'torch': torch.__version__,
    'function': 'trlx/models/modeling_ilql.py: ILQLConfig.loss, generate; '
    'src/models/iql_model.py: PerTokenIQL.get_qvs, get_loss, score',
    'note': 'vs has one more column than actions: the state after the last one, whose value the '
    'references set to 0, as that of every padded state. *_decode: scores of the first token; '
    "they have no loss. prompt_logits are used in the authors' cases alone.",
  }
  fixture = making.Fixture('ilql', about, inputs)
  t = making.tensors(inputs)
  add_trlx(fixture, arguments.trlx / 'trlx' / 'models' / 'modeling_ilql.py', t)
  add_authors(fixture, arguments.authors / 'src' / 'models' / 'iql_model.py', t)
  fixture.save()


if __name__ == '__main__':
  main()
