"""simpo.npz: the SimPO authors' loss, and TRL's CPO losses (sigmoid, hinge, ipo, simpo, AlphaPO).

Set-up, with a torch for CPU in a virtual environment:

  git clone https://github.com/princeton-nlp/SimPO
  git -C SimPO checkout 1b3e8f3528a23bce3da514a2dce8ea7490d4bc75
  pip install torch trl==1.16.0
  python -m tests.golden.make_simpo SimPO
"""

import typing
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.experimental.cpo import CPOTrainer

from tests.golden import making

PROMPT = 3  # Tokens; they count nowhere.
METHODS = ('concatenated_forward', 'get_batch_logps', 'concatenated_inputs')
SIMPO: dict[str, dict[str, Any]] = {
  'simpo': {'beta': 2.0, 'gamma_beta_ratio': 0.25},
  'simpo_hinge': {'beta': 2.5, 'gamma_beta_ratio': 0.55, 'loss_type': 'hinge'},
  'simpo_smoothed': {'beta': 2.0, 'gamma_beta_ratio': 0.5, 'label_smoothing': 0.1},
  'simpo_sft': {'beta': 2.0, 'gamma_beta_ratio': 0.5, 'sft_weight': 0.3},
}
CPO: dict[str, dict[str, Any]] = {
  'trl_simpo': {'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5},
  'trl_simpo_nll': {'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5, 'cpo_alpha': 1.0},
  'trl_cpo': {'loss_type': 'sigmoid', 'beta': 0.1, 'cpo_alpha': 1.0},
  'trl_cpo_hinge': {'loss_type': 'hinge', 'beta': 0.1},
  'trl_cpo_ipo': {'loss_type': 'ipo', 'beta': 0.2},
  'trl_alphapo': {'loss_type': 'simpo', 'beta': 2.0, 'simpo_gamma': 0.5, 'alpha': 0.25},
}
PER_ROW = {'sft_weight', 'cpo_alpha'}  # Of these terms there is no loss of a single comparison.


def batch_of(mask: torch.Tensor) -> dict[str, torch.Tensor]:
  """What the trainers' collators give."""
  return {
    **making.token_batch('chosen_', mask[:, 0], PROMPT),
    **making.token_batch('rejected_', mask[:, 1], PROMPT),
  }


def model(logprobs: torch.Tensor) -> Any:
  """All chosen rows, then all rejected ones; the last position predicts nothing that counts."""
  rows = logprobs.transpose(0, 1).reshape(-1, logprobs.shape[-1])
  padded = torch.nn.functional.pad(rows, (PROMPT - 1, 1), value=-1.0)
  return lambda *args, **kwargs: SimpleNamespace(logits=making.binary_logits(padded))


def trainer_of(settings: dict[str, Any], methods: Any) -> Any:
  """A stand-in that has the settings and the methods the loss calls."""
  trainer = SimpleNamespace(
    accelerator=SimpleNamespace(device='cpu', gather_for_metrics=lambda x: x),
    is_encoder_decoder=False,
    label_pad_token_id=-100,
    padding_value=0,
    pad_token_id=0,
    aux_loss_enabled=False,
    **settings,
  )
  for name in ('get_batch_logps', 'concatenated_inputs'):
    setattr(trainer, name, methods[name])
  for name in set(methods) - {'get_batch_logps', 'concatenated_inputs'}:
    setattr(trainer, name, lambda *a, f=methods[name]: f(trainer, *a))
  return trainer


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  source = checkout / 'scripts' / 'simpo_trainer.py'
  scope = {
    **vars(typing),
    'torch': torch,
    'nn': torch.nn,
    'F': torch.nn.functional,
    'pad_to_length': lambda x, length, pad_value: x,
  }
  names = (*METHODS, 'simpo_loss', 'get_batch_loss_metrics')
  simpo = {n: making.definition(source, f'SimPOTrainer.{n}', dict(scope)) for n in names}
  names = (*METHODS, 'cpo_loss', 'get_batch_loss_metrics')
  cpo = {n: getattr(CPOTrainer, n) for n in names}
  inputs = making.pair_inputs(4)
  del inputs['ref_logprobs']
  about = {
    'reference': 'princeton-nlp/SimPO; huggingface/trl',
    'commit': making.commit(checkout),
    'version': f'trl {trl.__version__}',
    'torch': torch.__version__,
    'function': 'scripts/simpo_trainer.py: SimPOTrainer.get_batch_loss_metrics; '
    'trl.experimental.cpo CPOTrainer.get_batch_loss_metrics',
    'note': "Whole trainers' losses, on a model of two tokens that has the given log-probs.",
  }
  fixture = making.Fixture('simpo', about, inputs)
  t = making.tensors(inputs)
  logprobs, mask = t['policy_logprobs'], t['mask']
  defaults: Any = defaultdict(dict)
  defaults['simpo'] = {'label_smoothing': 0.0, 'loss_type': 'sigmoid', 'sft_weight': 0.0}
  defaults['trl'] = {'label_smoothing': 0.0, 'cpo_alpha': 0.0, 'alpha': 0.0, 'simpo_gamma': 0.5}
  for case, changes in {**SIMPO, **CPO}.items():
    family = case.partition('_')[0]
    settings = {**defaults[family], **changes}
    trainer = trainer_of(settings, simpo if family == 'simpo' else cpo)
    loss = trainer.get_batch_loss_metrics(model(logprobs), batch_of(mask))[0]
    outputs = {'loss': loss}
    if not any(settings.get(name) for name in PER_ROW):
      rows = [
        trainer.get_batch_loss_metrics(model(logprobs[i : i + 1]), batch_of(mask[i : i + 1]))[0]
        for i in range(len(mask))
      ]
      outputs['losses'] = torch.stack(rows)
    fixture.differentiate(case, settings, outputs, {'policy_logprobs': logprobs})
  fixture.save()


if __name__ == '__main__':
  main()
