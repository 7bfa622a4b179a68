"""orpo.npz: the odds-ratio loss of the ORPO authors and of TRL, with their likelihood terms.

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/xfactlab/orpo
  git -C orpo checkout 208d2d648068e700cbb1ae0e8320b1dc99b014ec
  pip install torch trl==1.16.0
  python -m tests.golden.make_orpo orpo
"""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.experimental.orpo import ORPOTrainer

from tests.golden import making

PROMPT = 3  # Tokens; the likelihood of all but the first is known.
SETTINGS = {'beta_0.1': 0.1, 'beta_1': 1.0}


class Float64Torch:
  """torch, but bfloat16 means float64: the authors' code rounds its mask and its loss to it."""

  def __getattr__(self, name: str) -> Any:
    return torch.float64 if name == 'bfloat16' else getattr(torch, name)


def model(rows: torch.Tensor) -> Any:
  """A model of `[N, PROMPT - 1 + R]` log-probs; its own loss is Transformers': over all labels."""
  logits = making.binary_logits(torch.nn.functional.pad(rows, (0, 1), value=-1.0))

  def apply(*args: Any, labels: Any = None, **kwargs: Any) -> Any:
    loss = None
    if labels is not None:
      cross_entropy = torch.nn.functional.cross_entropy
      loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return SimpleNamespace(logits=logits, loss=loss)

  return apply


def of_authors(functions: Any, rows: torch.Tensor, mask: Any, alpha: float, prompt: bool) -> Any:
  """Loss of log-probs `[B, 2, PROMPT - 1 + R]`."""
  trainer = SimpleNamespace(label_smoother=None, pad=0, alpha=alpha, disable_prompt_loss=not prompt)
  trainer.compute_logps = lambda **kwargs: functions['compute_logps'](trainer, **kwargs)
  attention = torch.zeros(len(mask), PROMPT + mask.shape[-1], dtype=torch.long)
  attention[:, :PROMPT] = 1
  batch = {
    'attention_mask': attention,
    **making.token_batch('positive_', mask[:, 0], PROMPT),
    **making.token_batch('negative_', mask[:, 1], PROMPT),
  }
  models = iter([model(rows[:, 1]), model(rows[:, 0])])  # Its order of calls: rejected first.
  return functions['compute_loss'](trainer, lambda **kwargs: next(models)(**kwargs), batch)


def of_trl(rows: torch.Tensor, mask: torch.Tensor, beta: float) -> Any:
  """(loss, metrics) of log-probs `[B, 2, PROMPT - 1 + R]`."""
  trainer = SimpleNamespace(
    accelerator=SimpleNamespace(device='cpu', gather_for_metrics=lambda x: x),
    is_encoder_decoder=False,
    padding_value=0,
    aux_loss_enabled=False,
    beta=beta,
    get_batch_logps=ORPOTrainer.get_batch_logps,
    concatenated_inputs=ORPOTrainer.concatenated_inputs,
  )
  for name in ('concatenated_forward', 'odds_ratio_loss'):
    setattr(trainer, name, functools.partial(getattr(ORPOTrainer, name), trainer))
  batch = {
    **making.token_batch('chosen_', mask[:, 0], PROMPT),
    **making.token_batch('rejected_', mask[:, 1], PROMPT),
  }
  stacked = rows.transpose(0, 1).reshape(-1, rows.shape[-1])
  return ORPOTrainer.get_batch_loss_metrics(trainer, model(stacked), batch)


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  scope = {'torch': Float64Torch(), 'wandb': SimpleNamespace(log=lambda values: None)}
  functions = {
    name: making.definition(checkout / 'src' / 'orpo_trainer.py', f'ORPOTrainer.{name}', scope)
    for name in ('compute_logps', 'compute_loss')
  }
  rng = np.random.default_rng(5)
  inputs = making.pair_inputs(6)
  del inputs['ref_logprobs']
  prompt_mask = np.ones((len(inputs['mask']), 2, PROMPT - 1), bool)
  inputs.update(making.logprobs(rng, prompt_mask, 'prompt_logprobs'))
  inputs['prompt_logprobs'][:, 1] = inputs['prompt_logprobs'][:, 0]
  about = {
    'reference': 'xfactlab/orpo; huggingface/trl',
    'commit': making.commit(checkout),
    'version': f'trl {trl.__version__}',
    'torch': torch.__version__,
    'function': 'src/orpo_trainer.py: ORPOTrainer.compute_loss; '
    'trl.experimental.orpo ORPOTrainer.get_batch_loss_metrics',
    'note': 'prompt_logprobs are of the prompt tokens but the first. Cases full_*: masks all true. '
    "In the other cases of the authors' code, column `length` of policy_logprobs is "
    'log(1 - p(pad)), because that code averages one padding token in. bfloat16 was replaced by '
    'float64; TRL rounds the odds ratio to float32.',
  }
  fixture = making.Fixture('orpo', about, inputs)
  t = making.tensors(inputs)
  leaves = {name: t[name] for name in ('policy_logprobs', 'prompt_logprobs')}
  rows = torch.cat([t['prompt_logprobs'], t['policy_logprobs']], -1)
  full = torch.ones_like(t['mask'])
  for case, beta in SETTINGS.items():
    loss, metrics = of_trl(rows, t['mask'], beta)
    outputs = {'loss': loss, 'log_odds': metrics['log_odds_chosen'], 'nll': metrics['nll_loss']}
    fixture.differentiate(f'trl_{case}', {'beta': beta, 'prompt_in_nll': True}, outputs, leaves)
    for prompt in (True, False):
      for name, mask in (('', t['mask']), ('full_', full)):
        loss = of_authors(functions, rows, mask, beta, prompt)
        hyperparameters = {'alpha': beta, 'prompt_in_nll': prompt}
        case_name = f'{name}authors_{case}' + ('' if prompt else '_response_nll')
        fixture.differentiate(case_name, hyperparameters, {'loss': loss}, leaves)
  fixture.save()


if __name__ == '__main__':
  main()
