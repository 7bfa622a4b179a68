"""Properties that every objective of the table must have, in every variant."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import metrics as metrics_lib
from rlhf_jax.objectives import OBJECTIVES, Actors, demands_of, objective_of
from tests import quick
from tests.objectives import batches, tabular
from tests.objectives.batches import B, K, R, kind_of
from tests.objectives.cases import CASES
from tests.objectives.tabular import DIRECT, TABLES, Evaluate

every_case = pytest.mark.parametrize('case', CASES)


def cases_of(*kinds: str) -> Any:
  """The cases that eat certain kinds of batches."""
  names = [name for name, config in CASES.items() if kind_of(config) in kinds]
  return pytest.mark.parametrize('case', names)


every_comparison = cases_of('comparisons')
with_reference_field = pytest.mark.parametrize(
  'case',
  [
    name
    for name, config in CASES.items()
    if kind_of(config) in ('comparisons', 'rankings', 'ratings', 'referenced_ratings')
    and objective_of(config).data != 'prompts'
  ],
)


def evaluator(case: str, actors: Actors) -> Evaluate:
  """`(params, batch) -> (Mean, metrics, gradient of the total)` of a case."""
  return tabular.evaluator(CASES[case], actors)


def batch_of(case: str) -> Any:
  """What a case eats."""
  return tabular.prepared(CASES[case], batches.make_batch(kind_of(CASES[case])))


def outputs_of(case: str) -> dict[str, np.ndarray]:
  """Outputs of `DIRECT` for what a case eats."""
  length = batches.texts_of(CASES[case], batch_of(case)).response.shape[-1]
  return tabular.make_outputs(kind_of(CASES[case]), length=length)


def trained_outputs(case: str) -> tuple[str, ...]:
  """The outputs by which a case's loss has a gradient."""
  name = objective_of(CASES[case]).name
  if name == 'reward_process':
    return ('token_scores',)
  if name.startswith('reward'):
    return ('scores',)
  extra = {'ppo': ('values',), 'iql': ('values', 'q'), 'ilql': ('values', 'q', 'q_nll')}
  return ('logprobs', *extra.get(name, ()))


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
def test_cases_are_valid_configs(case: str) -> None:
  """What is tested can be asked for."""
  CASES[case].validate('objective')


@every_case
@pytest.mark.parametrize(('bad', 'token'), [(np.nan, 0), (np.inf, 4), (-1e30, 2)])
def test_masked_contents_do_not_matter(case: str, bad: float, token: int) -> None:
  """Loss, metrics and gradients are bit for bit those without the garbage under the masks."""
  batch, tables = batch_of(case), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  assert_same(evaluate(tables, batches.garbage(batch, bad, token)), evaluate(tables, batch))


@every_case
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e30])
def test_masked_outputs_do_not_matter_and_have_no_gradient(case: str, bad: float) -> None:
  """What a model says at masked positions leaks nowhere; its gradient there is exactly 0.

  So is that by outputs which the loss only reports, or reads as constants.
  """
  batch, outputs = batch_of(case), outputs_of(case)
  masks = {
    name: mask for name, mask in batches.masks_of(CASES[case], batch).items() if name in outputs
  }
  dirty = outputs | {
    name: np.where(mask, outputs[name], np.float32(bad)) for name, mask in masks.items()
  }
  evaluate = evaluator(case, DIRECT)
  clean, spoiled = evaluate(outputs, batch), evaluate(dirty, batch)
  assert_same(spoiled, clean)
  for name, mask in masks.items():
    slopes = np.asarray(spoiled[2][name])
    np.testing.assert_array_equal(slopes[~mask], 0.0)
    assert np.isfinite(slopes).all()
    assert (slopes != 0).any() == (name in trained_outputs(case)), name


@every_case
def test_more_padding_changes_nothing(case: str) -> None:
  """Two more columns on the left of prompts and three on the right of responses."""
  batch, tables = batch_of(case), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  narrow, wide = evaluate(tables, batch), evaluate(tables, batches.pad(batch, 2, 3))
  assert_same(wide, narrow, rtol=1e-5, atol=1e-6)


@every_comparison
def test_swapping_labels_mirrors_the_loss(case: str) -> None:
  """Exchanging the two responses and their label leaves loss, accuracy and gradient as they were.

  Soft labels and ties included.
  """
  batch, tables = batch_of(case), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  mean, metrics, slopes = evaluate(tables, batch)
  swapped_mean, swapped_metrics, swapped_slopes = evaluate(tables, batches.swap(batch))
  assert_same((swapped_mean, swapped_slopes), (mean, slopes), rtol=1e-5, atol=1e-6)
  assert swapped_metrics['accuracy'].value() == metrics['accuracy'].value()


@every_comparison
def test_swapping_negates_the_predicted_difference(case: str) -> None:
  """The log-odds that the first is preferred change sign, and ask for nothing masked."""
  config = CASES[case]
  difference = objective_of(config).difference
  assert difference is not None
  batch, tables = batch_of(case), tabular.make_tables()
  evaluate = quick.jit(lambda rows: difference(config, TABLES, tables, rows))
  forward = evaluate(batch)
  assert forward.shape == (B,) and forward.dtype == jnp.float32
  backward = evaluate(batches.swap(batch))
  np.testing.assert_allclose(backward, -forward, rtol=1e-5, atol=1e-6)
  dirty = evaluate(batches.garbage(batch, np.nan, 1))
  np.testing.assert_array_equal(dirty, forward)


@cases_of('rankings')
def test_the_order_in_which_a_ranking_is_listed_does_not_matter(case: str) -> None:
  """Ranks say what is better, places do not; also those of responses that are not there."""
  batch, tables = batch_of(case), tabular.make_tables()
  evaluate = evaluator(case, TABLES)
  reordered = evaluate(tables, batches.reorder(batch, [2, 0, 1]))
  assert_same(reordered, evaluate(tables, batch), rtol=1e-5, atol=1e-6)


@every_case
def test_splitting_rows_changes_nothing(case: str) -> None:
  """Totals, weights, metrics and gradients of two halves of unequal length make up the whole's."""
  if not demands_of(CASES[case]).group:
    pytest.skip('It pairs all rows of a batch, which ExperimentConfig refuses to accumulate.')
  batch, tables = batch_of(case), tabular.make_tables()
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
  batch = batch_of(case)
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), outputs_of(case))
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
  outputs, batch = outputs_of(case), batch_of(case)
  outputs['logprobs'] = outputs['logprobs'] + np.float32(size)
  if outputs['logprobs'].ndim == 3:  # the responses to a prompt move apart
    signs = np.array([1.0, -1.0, 1.0], np.float32)[: outputs['logprobs'].shape[1]]
    outputs['logprobs'] = outputs['logprobs'] * signs[:, None]
  for name in {'scores', 'token_scores', 'target_q'} & set(outputs):
    outputs[name] = outputs[name] * np.float32(size)
  mean, _, slopes = evaluator(case, DIRECT)(outputs, batch)
  assert np.isfinite(mean.total)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@with_reference_field
def test_reference_log_probs_are_needed_exactly_where_declared(case: str) -> None:
  """Objectives that declare no reference never read its log-probs; the others refuse to do without.

  SFT and scored steps have none to read; what samples carry is read by GRPO and online DPO.
  """
  config, tables, batch = CASES[case], tabular.make_tables(), batch_of(case)
  bare = batches.without_reference(batch)
  if objective_of(config).reference(config):
    with pytest.raises(AssertionError, match='reference'):
      jax.eval_shape(functools.partial(objective_of(config).loss, config, TABLES), tables, bare)
  else:
    evaluate = evaluator(case, TABLES)
    assert_same(evaluate(tables, bare), evaluate(tables, batch))


@pytest.mark.parametrize('kind', sorted({kind_of(config) for config in CASES.values()}))
def test_batches_have_padding_to_test_with(kind: str) -> None:
  """The batches above are ragged on both sides, and no response is empty."""
  batch = batches.make_batch(kind)
  sequences = batches.sequences_of(batch)
  assert not sequences.response_mask.all() and sequences.response_mask.any(-1).all()
  assert not sequences.prompt_mask.all() and sequences.prompt_mask[..., -1].all()
  assert sequences.response_mask.shape == (*batches.SHAPES.get(kind, (B,)), R)
  if kind == 'rankings':
    assert not batch.mask.all() and batch.mask.shape == (B, K)
