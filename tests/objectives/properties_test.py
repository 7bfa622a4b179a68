"""Properties that every objective of the table must have, in every variant."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.objectives import OBJECTIVES, Actors, objective_of
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.sft import SFTConfig
from tests import quick
from tests.objectives import tabular
from tests.objectives.tabular import DIRECT, TABLES, B, Evaluate, R

CASES: dict[str, Any] = {
  'sft': SFTConfig(),
  'reward_model': RewardModelConfig(),
  'reward_model margin, centring': RewardModelConfig(
    margin_coefficient=0.7, center_coefficient=0.01
  ),
  'dpo': DPOConfig(),
  'robust': DPOConfig(variant='robust', label_smoothing=0.1),
  'ipo mean': DPOConfig(variant='ipo', reduction='mean', nll_coefficient=0.5),
  'hinge': DPOConfig(variant='hinge', beta=0.7),
  'cpl': CPLConfig(),
  'cpl discounted, imitating chosen': CPLConfig(
    gamma=0.9, lam=0.75, bc_coefficient=0.3, bc_responses='chosen'
  ),
  'cpl-kl, imitating all': CPLConfig(use_reference=True, bc_coefficient=1.0),
  'ppo': PPOConfig(value_coefficient=0.5),
}
every_case = pytest.mark.parametrize('case', CASES)
every_comparison = pytest.mark.parametrize(
  'case', [name for name, config in CASES.items() if objective_of(config).data == 'comparisons']
)


def evaluator(case: str, actors: Actors) -> Evaluate:
  """`(params, batch) -> (Mean, metrics, gradient of the total)` of a case."""
  return tabular.evaluator(CASES[case], actors)


def data_of(case: str) -> str:
  """The kind of batch a case eats."""
  return objective_of(CASES[case]).data


def assert_same(first: Any, second: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
  """Equal trees, to the bit unless a tolerance is given."""
  assert str(jax.tree.structure(first)) == str(jax.tree.structure(second))
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path), equal_nan=False
    )


def values_of(metrics: Any) -> Any:
  """Metrics as numbers."""
  return {name: metric.value() for name, metric in metrics.items()}


def test_every_objective_has_a_case() -> None:
  """An objective added to the table must be added here."""
  assert {objective_of(config).name for config in CASES.values()} == set(OBJECTIVES)


@every_case
@pytest.mark.parametrize(('bad', 'token'), [(np.nan, 0), (np.inf, 4), (-1e30, 2)])
def test_masked_contents_do_not_matter(case: str, bad: float, token: int) -> None:
  """Loss, metrics and gradients are bit for bit those without the garbage under the masks."""
  batch, tables = tabular.make_batch(data_of(case)), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  assert_same(evaluate(tables, tabular.garbage(batch, bad, token)), evaluate(tables, batch))


@every_case
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e30])
def test_masked_outputs_do_not_matter_and_have_no_gradient(case: str, bad: float) -> None:
  """What a model says at masked positions leaks nowhere; its gradient there is exactly 0."""
  batch = tabular.make_batch(data_of(case))
  outputs = tabular.make_outputs(data_of(case))
  masks = tabular.masks_of(batch)
  dirty = outputs | {
    name: np.where(mask, outputs[name], np.float32(bad)) for name, mask in masks.items()
  }
  evaluate = evaluator(case, DIRECT)
  clean, spoiled = evaluate(outputs, batch), evaluate(dirty, batch)
  assert_same(spoiled, clean)
  for name, mask in masks.items():
    np.testing.assert_array_equal(spoiled[2][name][~mask], 0.0)
  used = {'reward_model': 'scores'}.get(objective_of(CASES[case]).name, 'logprobs')
  unmasked = np.asarray(spoiled[2][used])[masks.get(used, slice(None))]
  assert np.isfinite(unmasked).all() and (unmasked != 0).any()


@every_case
def test_more_padding_changes_nothing(case: str) -> None:
  """Two more columns on the left of prompts and three on the right of responses."""
  batch, tables = tabular.make_batch(data_of(case)), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  narrow, wide = evaluate(tables, batch), evaluate(tables, tabular.pad(batch, 2, 3))
  assert_same(wide, narrow, rtol=1e-5, atol=1e-6)


@every_comparison
def test_swapping_labels_mirrors_the_loss(case: str) -> None:
  """Exchanging the two responses and their label leaves loss, accuracy and gradient as they were.

  Soft labels and ties included.
  """
  batch, tables = tabular.make_batch('comparisons'), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  mean, metrics, slopes = evaluate(tables, batch)
  swapped_mean, swapped_metrics, swapped_slopes = evaluate(tables, tabular.swap(batch))
  assert_same((swapped_mean, swapped_slopes), (mean, slopes), rtol=1e-5, atol=1e-6)
  assert swapped_metrics['accuracy'].value() == metrics['accuracy'].value()


@every_comparison
def test_swapping_negates_the_predicted_difference(case: str) -> None:
  """The log-odds that the first is preferred change sign, and ask for nothing masked."""
  config = CASES[case]
  difference = objective_of(config).difference
  assert difference is not None
  batch, tables = tabular.make_batch('comparisons'), tabular.make_tables()
  evaluate = quick.jit(lambda rows: difference(config, TABLES, tables, rows))
  forward = evaluate(batch)
  assert forward.shape == (B,) and forward.dtype == jnp.float32
  backward = evaluate(tabular.swap(batch))
  np.testing.assert_allclose(backward, -forward, rtol=1e-5, atol=1e-6)
  dirty = evaluate(tabular.garbage(batch, np.nan, 1))
  np.testing.assert_array_equal(dirty, forward)


@every_case
def test_splitting_rows_changes_nothing(case: str) -> None:
  """Totals, weights, metrics and gradients of two halves of unequal length make up the whole's."""
  batch, tables = tabular.make_batch(data_of(case)), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  whole = evaluate(tables, batch)
  halves = [jax.tree.map(lambda x, start=start: x[start::2], batch) for start in (0, 1)]
  parts = [evaluate(tables, half) for half in halves]
  mean = parts[0][0].merge(parts[1][0])
  slopes = jax.tree.map(jnp.add, parts[0][2], parts[1][2])
  assert_same((mean, slopes), (whole[0], whole[2]), rtol=1e-5, atol=1e-6)
  merged = values_of(metrics_lib.merge([part[1] for part in parts]))
  assert_same(merged, values_of(whole[1]), rtol=1e-5, atol=1e-6)


@every_case
def test_losses_and_metrics_are_float32(case: str) -> None:
  """Also of a model that answers in bfloat16: its rounded answers, then float32 throughout."""
  batch = tabular.make_batch(data_of(case))
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tabular.make_outputs(data_of(case)))
  objective = objective_of(CASES[case])
  loss = quick.jit(lambda params: objective.loss(CASES[case], DIRECT, params, batch))
  mean, metrics = loss(half)
  assert {leaf.dtype for leaf in jax.tree.leaves((mean, metrics))} == {jnp.dtype('float32')}
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  assert_same(mean, evaluator(case, DIRECT)(rounded, batch)[0], rtol=1e-5)


@every_case
@pytest.mark.parametrize('size', [1e3, -1e3])
def test_gradients_stay_finite_at_extreme_log_ratios(case: str, size: float) -> None:
  """Responses 1000 nats a token likelier or less likely than before: finite loss and gradients."""
  data = data_of(case)
  outputs, batch = tabular.make_outputs(data), tabular.make_batch(data)
  outputs['logprobs'] = outputs['logprobs'] + np.float32(size)
  if data == 'comparisons':  # the responses of a pair move apart
    outputs['logprobs'] = outputs['logprobs'] * np.array([[[1.0], [-1.0]]], np.float32)
  outputs['scores'] = outputs['scores'] * np.float32(size)
  mean, _, slopes = evaluator(case, DIRECT)(outputs, batch)
  assert np.isfinite(mean.total)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@every_comparison
def test_reference_log_probs_are_needed_exactly_where_declared(case: str) -> None:
  """Objectives that declare no reference never read its log-probs; the others refuse to do without.

  SFT has none to read, and PPO's were used up in the rollout.
  """
  config, tables = CASES[case], tabular.make_tables()
  batch = tabular.make_batch('comparisons')
  bare = dataclasses.replace(batch, reference_logprobs=None)
  if objective_of(config).reference(config):
    with pytest.raises(AssertionError, match='reference'):
      jax.eval_shape(functools.partial(objective_of(config).loss, config, TABLES), tables, bare)
  else:
    evaluate = evaluator(case, TABLES)
    assert_same(evaluate(tables, bare), evaluate(tables, batch))


def test_batches_have_padding_to_test_with() -> None:
  """The batches above are ragged on both sides, and no response is empty."""
  mask = tabular.make_batch('comparisons').sequences.response_mask
  assert not mask.all() and mask.any(-1).all() and mask.shape == (B, 2, R)
