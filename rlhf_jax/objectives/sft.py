"""Supervised fine-tuning, and behaviour cloning: maximum likelihood of given responses."""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.common.checks import check_shapes
from rlhf_jax.common.metrics import Mean
from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives.base import Actors, LossOutput, Objective, Params


@dataclasses.dataclass(kw_only=True)
class SFTConfig:
  """Supervised fine-tuning has no settings of its own; `data.responses` says what it imitates."""

  def validate(self, path: str) -> None:
    """Nothing to check."""
    del path


def loss(config: SFTConfig, actors: Actors, params: Params, batch: Sequences) -> LossOutput:
  """Mean negative log-likelihood of the response tokens, over all tokens of all rows.

  Of the rest of a dialogue only the assistant's tokens count (`Sequences.loss_mask`): those of
  other turns are attended to, and the gradient of their own log-probs is exactly zero.

  Args:
    config: the objective's settings.
    actors: `policy` is called.
    params: the policy's parameters.
    batch: `[B, P]` prompts and `[B, R]` responses.
  """
  del config
  assert actors.policy is not None
  output, mask = actors.policy(params, batch), batch.imitated
  check_shapes('mask:BR logprobs:BR', mask=mask, logprobs=output.logprobs)
  mean = Mean.of(-output.logprobs, mask)
  return mean, {
    'nll': mean,
    'entropy': Mean.of(output.entropy, mask),
    'sequence_logprob': Mean.of(jnp.where(mask, output.logprobs, 0.0).sum(-1)),
  }


OBJECTIVE = Objective('sft', SFTConfig, 'demonstrations', loss, domains=('text', 'control'))
