"""Contrastive preference learning from scores: all ordered pairs of a batch's segments."""

import dataclasses

import jax

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Rankings, Ratings
from rlhf_jax.objectives import cpl_dense
from rlhf_jax.objectives.base import (
  Actors,
  Demands,
  LossOutput,
  Objective,
  Params,
  response_logprobs,
)
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig

Array = jax.Array


@dataclasses.dataclass(kw_only=True)
class ScoredCPLConfig(DenseCPLConfig):
  """Contrastive preference learning on scored segments (Hejna et al. 2023, released code)."""

  # Rows of a batch among which pairs are formed; 0: all of them, as in the released code (which has
  # 96 in a batch). Groups stay whole in microbatches, so accumulation must divide their number.
  group_size: int = 0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    super().validate(path)
    if self.group_size < 0 or self.group_size == 1:
      raise ConfigError(
        f'{path}.group_size',
        self.group_size,
        'an integer >= 2, or 0 for the whole batch',
        'One segment alone makes no pair.',
      )


def in_groups(rows: Array, size: int) -> Array:
  """`[B, ...]` -> `[groups, size, ...]`, row b in group b mod groups; a size of 0 is B.

  The stride is that of `common.rows.split_rows`: a microbatch holds some of the groups, each whole.
  """
  count = rows.shape[0]
  return rows.reshape((size or count, -1) + rows.shape[1:]).swapaxes(0, 1)


def as_rankings(batch: Ratings, size: int) -> Rankings:
  """Groups of scored responses as rankings; of equal scores neither is the better."""
  grouped = jax.tree.map(lambda x: in_groups(x, size), batch)
  return Rankings(
    sequences=grouped.sequences,
    rank=-grouped.score,
    mask=grouped.sequences.response_mask.any(-1),
    reference_logprobs=grouped.reference_logprobs,
  )


def loss(config: ScoredCPLConfig, actors: Actors, params: Params, batch: Ratings) -> LossOutput:
  """As `cpl_dense.loss`, over all pairs of a group whose scores differ."""
  logprobs = response_logprobs(actors, params, batch.sequences)
  size = config.group_size
  return cpl_dense.loss_of(config, in_groups(logprobs, size), as_rankings(batch, size))


def demands(config: ScoredCPLConfig) -> Demands:
  """Whole groups."""
  return Demands(compares_rows=True, group=config.group_size)


OBJECTIVE = Objective(
  'cpl_scored',
  ScoredCPLConfig,
  'ratings',
  loss,
  lambda config: config.use_reference,
  demands=demands,
  domains=('text', 'control'),
)
