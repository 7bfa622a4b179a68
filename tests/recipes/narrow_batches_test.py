"""Batches that take less work say the same: shared prompts, length buckets, packed texts."""

import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.config import DataConfig
from rlhf_jax.models import roles
from rlhf_jax.objectives import objective_of
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.recipes import offline
from tests import tiny
from tests.models.architectures import make_config, make_params
from tests.objectives.batches import VOCAB, make_batch
from tests.recipes import split_test

# Objectives that compare responses to one prompt.
COMPARING = [
  case
  for case, config in tiny.OBJECTIVES.items()
  if objective_of(config()).data in ('comparisons', 'rankings')
]
MODEL = make_config('qwen3', vocab_size=VOCAB, layers=1)


def share(batch: Any) -> Any:
  """The batch with the first prompt of each row for all its responses, there once."""
  rows = batch.sequences
  once = dataclasses.replace(rows, prompt=rows.prompt[:, :1], prompt_mask=rows.prompt_mask[:, :1])
  return dataclasses.replace(batch, sequences=once)


def repeat(batch: Any) -> Any:
  """The same with a copy of the prompt for each response."""
  rows = batch.sequences
  shape = (*rows.response.shape[:-1], rows.prompt.shape[-1])
  copies = dataclasses.replace(
    rows,
    prompt=np.broadcast_to(rows.prompt, shape),
    prompt_mask=np.broadcast_to(rows.prompt_mask, shape),
  )
  return dataclasses.replace(batch, sequences=copies)


@pytest.mark.parametrize('case', COMPARING)
def test_objectives_say_the_same_of_shared_prompts(case: str) -> None:
  """Loss, metrics, gradients, and the difference that evaluations ask for."""
  config: Any = tiny.OBJECTIVES[case]()
  objective = objective_of(config)
  parts: Any = SimpleNamespace(model=MODEL)
  actors = offline.make_actors(parts)
  decoder = make_params(MODEL)
  params: Any = {'policy': decoder}
  if objective.trains == 'reward_model':
    params = {'reward_model': roles.reward_model_from_trunk(MODEL, decoder, jax.random.key(1))}
  batch = make_batch(objective.data)

  def read(params: Any, batch: Any) -> Any:
    if objective.demands(config).prepares != 'nothing':
      assert objective.prepare is not None
      batch = objective.prepare(config, actors, params, None, batch)
    mean, metrics = objective.loss(config, actors, params, batch)
    said = (
      None if objective.difference is None else objective.difference(config, actors, params, batch)
    )
    return mean.total, (mean, metrics, said)

  one = jax.jit(jax.value_and_grad(read, has_aux=True))
  (_, found), gradients = one(params, share(batch))
  (_, expected), expected_gradients = one(params, repeat(share(batch)))

  def check(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))

  jax.tree.map(check, (found, gradients), (expected, expected_gradients))


def data_config(**changes: Any) -> DataConfig:
  """The tiny stages' data with room for longer texts than there are."""
  data = tiny.make_config('sft').data
  return dataclasses.replace(data, prompt_length=9, response_length=6, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('case', 'changes', 'accumulation', 'mesh'),
  [
    ('dpo', dict(share_prompts=False), 2, (2, 2, 2)),
    ('dpo', dict(length_buckets=3), 2, (1, 1, 1)),
    ('reward_listwise', dict(length_buckets=3), 1, (1, 1, 1)),
    ('reward_process', dict(length_buckets=3), 1, (1, 1, 1)),
    ('ilql', dict(length_buckets=3), 1, (1, 1, 1)),
    ('sft', dict(pack=True), 2, (2, 2, 1)),
    ('sft', dict(pack=True, length_buckets=3), 1, (1, 1, 1)),
  ],
)
def test_a_step_is_the_same(
  case: str, changes: Any, accumulation: int, mesh: Any, parents: pathlib.Path
) -> None:
  """Metrics and gradients of the same records, read plainly and with less work."""

  def step(data: DataConfig, accumulation: int, mesh: Any) -> Any:
    original = tiny.make_config

    def make(*arguments: Any, **options: Any) -> Any:
      return dataclasses.replace(original(*arguments, **options), data=data)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tiny, 'make_config', make)
      return split_test.take_step(split_test.build(case, parents, mesh, accumulation))

  expected = step(data_config(), 1, (1, 1, 1))
  found = step(data_config(**changes), accumulation, mesh)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(x.prepared)) for x in (expected, found)]
  if 'length_buckets' in changes:
    assert sizes[1] < sizes[0]
  assert found.metrics == pytest.approx(expected.metrics, rel=2e-5, abs=1e-5)
  for name, gradient in expected.gradients.items():
    scale = max(np.abs(gradient).max(), 1e-3)
    np.testing.assert_allclose(
      found.gradients[name], gradient, rtol=0, atol=2e-6 + 1e-5 * scale, err_msg=name
    )


@pytest.mark.slow
def test_a_cached_reference_fits_batches_of_any_width(parents: pathlib.Path) -> None:
  """What was scored in narrow batches is the same in those of training."""
  for step in range(3):
    batches = []
    for kind in ('online', 'cached'):
      config = tiny.make_config('dpo', parents, objective=DPOConfig(reference=kind))
      config.data = data_config(length_buckets=3, length_window=2)
      built = tiny.build_recipe(config)
      with jax.set_mesh(built.mesh):
        state = built.recipe.init()
        batches.append(jax.device_get(built.recipe.prepare(state, built.recipe.batch(step)).batch))
    mask = batches[0].sequences.response_mask
    one, other = (np.where(mask, batch.reference_logprobs, 0) for batch in batches)
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
  ('objective', 'changes', 'message'),
  [
    (DPOConfig(), dict(pack=True), 'False for dpo'),
    (KTOConfig(), dict(length_buckets=2, length_window=4), '1 for kto'),
    (SFTConfig(), dict(length_window=4), r'1 with data.length_buckets=1'),
    (SFTConfig(), dict(length_buckets=0), 'an integer >= 1'),
    (tiny.OBJECTIVES['grpo'](), dict(length_buckets=2), '1 for grpo'),
  ],
)
def test_what_would_not_be_the_same_is_refused(objective: Any, changes: Any, message: str) -> None:
  config = tiny.make_config('sft', objective=objective)
  config.policy.init = config.reward_model.init = 'somewhere'
  config.data = dataclasses.replace(config.data, **changes)
  with pytest.raises(Exception, match=message) as error:
    config.validate()
  assert 'data.' in str(error.value)
