"""How far do words alone go? A bag-of-words Bradley-Terry model on a config's comparisons.

  python -m benchmarks.bag_of_words --config=configs/hh_harmless_reward_model.py \\
    --config.data.path=harmless_base_test.jsonl.gz

A reward model that does not beat it has learnt little that is not in single words. The split is the
config's own; responses are read whole, and cut to what the config's reward model reads of them. The
accuracy on held-out comparisons is printed with its 95% interval, beside that of length alone.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags
from scipy import optimize, sparse

from experiments import cli
from rlhf_jax.common.errors import UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.data.sources import load as load_feedback
from rlhf_jax.evaluation.preferences import verdicts_right
from rlhf_jax.evaluation.statistics import proportion_interval
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.feedback.records import Comparison
from rlhf_jax.recipes.parts import make_tokenizer

CONFIG = cli.define_config('A config whose data has comparisons.')
PENALTY = flags.DEFINE_float('penalty', 10.0, 'Weight of half the squared norm.', 0.0)

Read = Callable[[str], str]


def features(text: str) -> dict[str, float]:
  """log(1 + count) of lower-case words, punctuation marks and their pairs."""
  words = re.findall(r"[a-z']+|[^\sa-z]", text.lower())
  counts = collections.Counter([*words, *map(' '.join, zip(words, words[1:], strict=False))])
  return {name: float(np.log1p(count)) for name, count in counts.items()}


def differences(
  pairs: Sequence[Comparison], read: Read, vocabulary: dict[str, int], grow: bool
) -> sparse.csr_matrix:
  """`[N, V]` features of the chosen response minus those of the rejected one."""
  rows, columns, values = [], [], []
  for row, pair in enumerate(pairs):
    for sign, text in ((1, pair.chosen), (-1, pair.rejected)):
      for name, value in features(read(text)).items():
        column = vocabulary.setdefault(name, len(vocabulary)) if grow else vocabulary.get(name)
        if column is not None:
          rows.append(row)
          columns.append(column)
          values.append(sign * value)
  return sparse.csr_matrix((values, (rows, columns)), shape=(len(pairs), len(vocabulary)))


def fit(rows: sparse.csr_matrix, penalty: float) -> np.ndarray:
  """`[V]` weights that minimise the Bradley-Terry loss plus the penalty."""

  def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
    scores = rows @ weights
    loss = np.logaddexp(0, -scores).sum() + 0.5 * penalty * weights @ weights
    return loss, penalty * weights - rows.T @ (1 / (1 + np.exp(scores)))

  start = np.zeros(rows.shape[1])
  return optimize.minimize(objective, start, jac=True, method='L-BFGS-B').x


def report(name: str, scores: np.ndarray, preference: np.ndarray) -> None:
  """Prints how often the preferred response has the larger score; labelled ties are left out."""
  right = verdicts_right(scores, preference)
  found = proportion_interval(right[None])
  print(f'{name:40} {found.mean:.3f}  [{found.low:.3f}, {found.high:.3f}]', flush=True)


def main() -> int:
  stage = cli.given(CONFIG)
  if not isinstance(stage, ExperimentConfig):
    raise UserError(
      f'--config: expected an ExperimentConfig from get_config(), got {type(stage).__name__}.'
    )
  config = stage.data
  config.validate('data')
  with tempfile.TemporaryDirectory() as folder:
    feedback = load_feedback(config, pathlib.Path(folder) / 'quarantine.jsonl')
  if not isinstance(feedback, Feedback):
    raise UserError(f'--config.data.source={config.source!r}: expected comparisons of texts.')
  train = feedback.require('train', 'comparisons')
  held_out = feedback.require('held_out', 'comparisons')
  preference = np.array([pair.preference for pair in held_out])
  tokenizer = make_tokenizer(config, feedback)

  def cut(text: str) -> str:
    return tokenizer.decode(tokenizer.encode_batch([text])[0][: config.response_length])

  print(f'{len(train)} comparisons to learn from, {len(held_out)} held out')
  readings: dict[str, Read] = {
    'whole responses': lambda text: text,
    f'their first {config.response_length} tokens': cut,
  }
  for name, read in readings.items():
    vocabulary: dict[str, int] = {}
    weights = fit(differences(train, read, vocabulary, grow=True), PENALTY.value)
    report(name, differences(held_out, read, vocabulary, grow=False) @ weights, preference)
  longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in held_out], float)
  report('the longer is preferred', longer, preference)
  report('the shorter is preferred', -longer, preference)
  return cli.DONE


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  cli.run(main)
