"""openai.npz: OpenAI's first PPO on language, its KL controller, and its losses of reward models.

The code is TensorFlow 1; its functions run under TensorFlow 2's compat.v1, eagerly. Set-up:

  git clone https://github.com/openai/lm-human-preferences
  git -C lm-human-preferences checkout cbfd210bb8b08f6bc5c26878c10984b90f516c66
  pip install tensorflow-cpu==2.21.0 numpy
  python -m tests.golden.make_openai lm-human-preferences
"""

import collections.abc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow

from tests.golden import making

tf = tensorflow.compat.v1
PPO = {
  'ppo': {'whiten_rewards': True, 'gamma': 1.0, 'lam': 0.95},
  'ppo_plain_rewards': {'whiten_rewards': False, 'gamma': 0.9, 'lam': 0.8},
}
CLIPPING = {'cliprange': 0.2, 'cliprange_value': 0.2, 'vf_coef': 0.1, 'kl_coef': 0.15}
LABELS = {  # Loss: the class, and where its scores come from.
  'best_of_4': ('PickBest', {'num_responses': 4}),
  'scalar_rating': ('ScalarRating', {}),
  'scalar_compare': ('ScalarComparison', {}),
}


def double(array: np.ndarray) -> Any:
  return tf.constant(array.astype(np.float64))


def add_ppo(fixture: making.Fixture, package: Path, inputs: dict[str, np.ndarray]) -> None:
  """`compute_rewards` and the loss of `PPOTrainer`."""
  utils: dict[str, Any] = {'tf': tf, 'collections': collections.abc}  # Where Mapping went.
  for name in ('whiten', 'flatten_dict'):
    making.definition(package / 'utils' / 'core.py', name, utils)
  source = package / 'train_policy.py'
  scope: dict[str, Any] = {'tf': tf, 'utils': SimpleNamespace(**utils)}
  loss_function = making.definition(source, 'PPOTrainer.loss', scope)
  for case, changes in PPO.items():
    settings = {**CLIPPING, **changes}
    leaves = {name: double(inputs[name]) for name in ('logprobs', 'values')}
    trainer = SimpleNamespace(
      kl_ctl=SimpleNamespace(value=settings['kl_coef']),
      hparams=SimpleNamespace(
        ppo=SimpleNamespace(**settings),
        task=SimpleNamespace(response_length=making.COLUMNS),
      ),
      policy=SimpleNamespace(
        analyze_responses_op=lambda queries, responses, leaves=leaves: {
          **leaves,
          'entropies': tf.zeros([1], tf.float64),
        }
      ),
    )
    state: dict[str, Any] = {'self': trainer}
    making.statements(source, 'def compute_rewards', 'self.compute_rewards', state)
    names = ('scores', 'old_logprobs', 'ref_logprobs')
    rewards = trainer.compute_rewards(*(inputs[n].astype(np.float64) for n in names))[0]
    rollouts = {
      'values': double(inputs['old_values']),
      'logprobs': double(inputs['old_logprobs']),
      'rewards': double(rewards),
      'queries': None,
      'responses': None,
    }
    with tensorflow.GradientTape() as tape:
      tape.watch(leaves)
      loss, stats = loss_function(trainer, rollouts)
    gradients = tape.gradient(loss, leaves)
    outputs = {name.replace('/', '_'): float(value) for name, value in stats.items()}
    fixture.add(case, settings, {**outputs, 'loss': loss, 'rewards': rewards}, gradients)


def add_controller(fixture: making.Fixture, package: Path, kls: np.ndarray) -> None:
  """The coefficients that `AdaptiveKLController` takes one after another."""
  settings = {'kl_coef': 0.15, 'target': 6.0, 'horizon': 10000, 'batch_size': 512}
  kind = making.definition(package / 'train_policy.py', 'AdaptiveKLController', {'np': np})
  controller = kind(settings['kl_coef'], SimpleNamespace(**settings))
  coefficients = []
  for kl in kls.astype(np.float64):
    controller.update(kl, settings['batch_size'])
    coefficients.append(controller.value)
  fixture.add('adaptive_kl', settings, {'coefficients': np.array(coefficients)}, {})


def add_labels(fixture: making.Fixture, package: Path, inputs: dict[str, np.ndarray]) -> None:
  """Losses of reward models, of the scores `[B, 4]` of four responses, or of the first ones."""
  source = package / 'label_types.py'
  scope: dict[str, Any] = {'tf': tf}
  making.definition(package / 'utils' / 'core.py', 'pearson_r', scope)
  for case, (name, settings) in LABELS.items():
    loss_function = making.definition(source, f'{name}.loss', scope)
    scores = double(inputs['reward_scores'])
    labels = {
      'query': None,
      'sample': 0,
      **{f'sample{i}': i for i in range(4)},
      'best': tf.constant(inputs['best']),
      'score': double(inputs['ratings']),
      'difference': double(inputs['differences']),
    }
    with tensorflow.GradientTape() as tape:
      tape.watch(scores)
      given = SimpleNamespace(**settings)
      stats = loss_function(given, lambda query, i, s=scores: s[:, i], labels)
    gradients = {'reward_scores': tape.gradient(stats['loss'], scores)}
    fixture.add(case, settings, {'loss': stats['loss']}, gradients)


def main() -> None:
  checkout = making.checkout_argument(__doc__)
  package = checkout / 'lm_human_preferences'
  rng = np.random.default_rng(9)
  mask = np.ones((len(making.ROW_LENGTHS), making.COLUMNS), bool)
  values = rng.normal(0, 1, mask.shape)
  inputs = {
    'mask': mask,
    **making.logprobs(rng, mask, 'logprobs', 'old_logprobs', 'ref_logprobs', spread=0.2),
    'values': making.float32(values + rng.normal(0, 0.3, mask.shape)),
    'old_values': making.float32(values),
    'scores': making.float32(rng.normal(0.5, 1, len(mask))),
    'kls': making.float32([3.0, 5.9, 6.1, 7.3, 20.0, 0.0]),
    'reward_scores': making.float32(rng.normal(0, 2, (6, 4))),
    'best': np.array([0, 3, 1, 1, 2, 0]),
    'ratings': making.float32(rng.normal(0, 1, 6)),
    'differences': making.float32(rng.normal(0, 2, 6)),
  }
  about = {
    'reference': 'openai/lm-human-preferences',
    'commit': making.commit(checkout),
    'version': f'tensorflow {tensorflow.__version__}',
    'function': 'train_policy.py: PPOTrainer.compute_rewards, PPOTrainer.loss, '
    'AdaptiveKLController; label_types.py: PickBest, ScalarRating, ScalarComparison',
    'note': 'Responses have one length there: masks are all true. ratings belong to response 0; '
    'differences are of response 1 above response 0.',
  }
  fixture = making.Fixture('openai', about, inputs)
  add_ppo(fixture, package, inputs)
  add_controller(fixture, package, inputs['kls'])
  add_labels(fixture, package, inputs)
  fixture.save()


if __name__ == '__main__':
  main()
