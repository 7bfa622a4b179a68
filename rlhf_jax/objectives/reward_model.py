"""Reward model: Bradley-Terry likelihood of comparisons."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.common.checks import check_float, check_shapes
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Pairs
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Normalization,
  Objective,
  Params,
  flatten_rows,
)

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class RewardModelConfig:
  """Bradley-Terry reward model."""

  # Weight of the margin of a comparison inside the sigmoid (Touvron et al. 2023, Llama 2, eq. 2).
  # 0 ignores margins.
  margin_coefficient: float = 0.0
  # Weight of the penalty (r_chosen + r_rejected)^2 that keeps scores near 0 (Eisenstein et al.
  # 2023, "Helping or herding?", eq. 2). 0 is none.
  center_coefficient: float = 0.0
  # 'policy_samples': gain and bias make scores of responses sampled from the stage's initial
  # policy have mean 0 and std 1, before and after training (Ziegler et al. 2019); 'demonstrations':
  # a bias alone makes the mean over reference responses 0, after training (Huang et al. 2024);
  # 'none'.
  normalization: str = 'demonstrations'
  # How many responses the statistics are taken over (256 in Ziegler et al. 2019).
  normalization_samples: int = 256

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('margin_coefficient', 'center_coefficient'):
      if not getattr(self, name) >= 0:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    check_normalization(path, self.normalization, self.normalization_samples)


def check_normalization(path: str, kind: str, samples: int) -> None:
  """Raises ConfigError for a `normalization` that is none."""
  kinds = ('none', 'policy_samples', 'demonstrations')
  if kind not in kinds:
    raise ConfigError(f'{path}.normalization', kind, f'one of {kinds}')
  if samples < 2:
    raise ConfigError(f'{path}.normalization_samples', samples, 'at least 2')


def bradley_terry(
  scores: Array, preference: Array, margin: Array, *, margin_coefficient: float
) -> Array:
  """Negative log-likelihood of comparisons (Bradley & Terry 1952).

    -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m),   d = score_chosen - score_rejected

  A tie is p = 0.5. The margin m makes either verdict ask for a larger difference.

  Args:
    scores: `[B, 2]` float, chosen first.
    preference: `[B]` probability that the first is preferred.
    margin: `[B]` float, multiplied by `margin_coefficient`.
    margin_coefficient: see `RewardModelConfig`.

  Returns:
    `[B]` float32.
  """
  check_shapes(
    'scores:B2 preference:B margin:B', scores=scores, preference=preference, margin=margin
  )
  check_float(scores=scores, preference=preference, margin=margin)
  scores = scores.astype(jnp.float32)
  difference = scores[:, 0] - scores[:, 1]
  margin = margin_coefficient * margin
  return -(
    preference * jax.nn.log_sigmoid(difference - margin)
    + (1 - preference) * jax.nn.log_sigmoid(-difference - margin)
  )


def preference_metrics(difference: Array, preference: Array) -> dict[str, Mean]:
  """Accuracy and log-loss of predicted differences against labels.

  A predicted tie is half right; a labelled tie cannot be got right or wrong and is left out.

  Args:
    difference: `[B]` float32, predicted log-odds that the first is preferred.
    preference: `[B]` labelled probability of the same.
  """
  predicted = 0.5 * (jnp.sign(difference) + 1)
  labelled = (preference > 0.5).astype(jnp.float32)
  right = jnp.where(difference == 0, 0.5, (predicted == labelled).astype(jnp.float32))
  log_loss = -(
    preference * jax.nn.log_sigmoid(difference) + (1 - preference) * jax.nn.log_sigmoid(-difference)
  )
  return {'accuracy': Mean.of(right, preference != 0.5), 'log_loss': Mean.of(log_loss)}


def pair_scores(actors: Actors, params: Params, batch: Pairs) -> Array:
  """Scores of both responses, `[B, 2]` float32."""
  assert actors.reward is not None
  return actors.reward(params, flatten_rows(batch.sequences)).reshape(-1, 2).astype(jnp.float32)


def loss(config: RewardModelConfig, actors: Actors, params: Params, batch: Pairs) -> LossOutput:
  """Bradley-Terry loss with optional margin and centring, mean over comparisons."""
  scores = pair_scores(actors, params, batch)
  losses = bradley_terry(
    scores, batch.preference, batch.margin, margin_coefficient=config.margin_coefficient
  )
  centring = jnp.square(scores.sum(-1))
  mean = Mean.of(losses + config.center_coefficient * centring)
  return mean, {
    **preference_metrics(scores[:, 0] - scores[:, 1], batch.preference),
    'chosen_score': Mean.of(scores[:, 0]),
    'rejected_score': Mean.of(scores[:, 1]),
    'centring': Mean.of(centring),
  }


def difference(config: RewardModelConfig, actors: Actors, params: Params, batch: Pairs) -> Array:
  """`[B]` score of the first response minus score of the second."""
  del config
  scores = pair_scores(actors, params, batch)
  return scores[:, 0] - scores[:, 1]


def demands(config: RewardModelConfig) -> Demands:
  """The normaliser."""
  return Demands(normalization=Normalization(config.normalization, config.normalization_samples))


OBJECTIVE = Objective(
  'reward_model',
  RewardModelConfig,
  'comparisons',
  loss,
  difference=difference,
  trains='reward_model',
  demands=demands,
  domains=('text', 'control'),
)
