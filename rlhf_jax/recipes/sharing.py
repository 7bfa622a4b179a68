"""Prompts that are read once for all samples that answer them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.common.types import Sequences
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.objectives import demands_of

Array = jax.Array


def shared_samples(config: ExperimentConfig, devices: int) -> int:
  """How many adjacent rows of a microbatch of samples have one prompt that is read once.

  Microbatches are made of every n-th row (`common.rows.split_rows`), so that each holds as many
  samples of a prompt, or one here and none there: those are read one by one. So are the samples of
  prompts that the devices which hold rows do not divide.
  """
  return _copies(config, demands_of(config.objective).samples, devices)


def shared_rows(config: ExperimentConfig, devices: int) -> int:
  """The same of the rows that updates learn from; minibatches are drawn from all rows."""
  demands = demands_of(config.objective)
  return _copies(config, demands.rows, devices) if demands.minibatches == 1 else 1


def _copies(config: ExperimentConfig, rows: int, devices: int) -> int:
  if not config.data.share_prompts or rows % config.accumulation or config.batch_size % devices:
    return 1
  return rows // config.accumulation


def once_a_prompt(read: Callable[..., Any], copies: int) -> Callable[..., Any]:
  """`read` with prompts read once.

  Args:
    read: of its last argument, sequences `[N, ...]`; what it gives has the leading axes of their
      responses.
    copies: how many adjacent ones have the same prompt.

  Returns:
    a function of the same arguments with the same results, to float error. Of sequences that are
    no whole number of groups, such as a single one that is looked at, each is read by itself.
  """
  if copies == 1:
    return read

  def shared(*arguments: Any) -> Any:
    *others, sequences = arguments
    if len(sequences.response) % copies:
      return read(*arguments)
    found = read(*others, _behind_prompts(sequences, copies))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

  return shared


def _behind_prompts(sequences: Sequences, copies: int) -> Sequences:
  """`[N, ...]` -> prompts `[N / copies, 1, P]` and responses `[N / copies, copies, R]`."""
  grouped = jax.tree.map(lambda x: x.reshape(-1, copies, *x.shape[1:]), sequences)
  return dataclasses.replace(
    grouped, prompt=grouped.prompt[:, :1], prompt_mask=grouped.prompt_mask[:, :1]
  )
