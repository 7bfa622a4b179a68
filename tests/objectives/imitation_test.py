"""Likelihood terms as means over tokens, and texts with their prompts, against plain loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.types import Sequences
from rlhf_jax.objectives.imitation import as_responses, preferred_nll, with_imitated_tokens
from rlhf_jax.objectives.orpo import ORPOConfig, orpo
from tests.objectives import batches, tabular
from tests.objectives.batches import B
from tests.objectives.settings import assert_refused
from tests.objectives.tabular import TABLES, make_batch, make_outputs, make_tables

PROMPTED = ORPOConfig(lam=0.3, nll_normalization='token', prompt_nll=True)


def test_a_mean_over_pairs_is_a_mean_over_tokens() -> None:
  """Each preferred token counts once, both responses of a tie among them; a response once, too."""
  batch = make_batch('comparisons')
  logprobs = make_outputs('comparisons')['logprobs'].astype(np.float64)
  mask = batch.sequences.response_mask
  tokens, responses = [], []
  for b, p in enumerate(batch.preference):
    of_pair = [logprobs[b, k][mask[b, k]] for k in (0, 1) if p == 0.5 or (k == 0) == (p > 0.5)]
    tokens += [x for response in of_pair for x in response]
    responses.append(np.mean([response.mean() for response in of_pair]))
  assert 0.5 in batch.preference
  config = ORPOConfig(nll_normalization='token')
  rows = tabular.prepared(config, batch)
  values = {
    kind: preferred_nll(kind, jnp.float32(logprobs), mask, rows) for kind in ('token', 'response')
  }
  np.testing.assert_allclose(values['token'].mean(), -np.mean(tokens), rtol=1e-6)
  np.testing.assert_allclose(values['response'].mean(), -np.mean(responses), rtol=1e-6)
  assert abs(np.mean(tokens) - np.mean(responses)) > 1e-3


def test_a_microbatch_keeps_the_count_of_the_whole() -> None:
  """Counted anew, a part has another mean; without it there is none."""
  batch = make_batch('comparisons')
  logprobs, mask = make_outputs('comparisons')['logprobs'], batch.sequences.response_mask
  whole: Any = with_imitated_tokens(batch, mask).imitated_tokens
  np.testing.assert_allclose(whole, np.full(B, mask.sum() / B))
  anew: Any = with_imitated_tokens(jax.tree.map(lambda x: x[:1], batch), mask[:1]).imitated_tokens
  assert anew[0] != whole[0]
  with pytest.raises(AssertionError, match='prepares whole batches'):
    preferred_nll('token', jnp.asarray(logprobs), mask, batch)


def test_texts_are_responses_to_first_tokens() -> None:
  """Left padding goes behind the response; what is masked may be anything."""
  sequences = make_batch('comparisons').sequences
  texts, response = as_responses(sequences)
  for index in np.ndindex(*sequences.prompt.shape[:2]):
    prompt = sequences.prompt[index][sequences.prompt_mask[index]]
    said = sequences.response[index][sequences.response_mask[index]]
    assert texts.prompt_mask[index].all() and texts.prompt[index] == prompt[:1]
    real = np.asarray(texts.response_mask[index])
    np.testing.assert_array_equal(texts.response[index][real], [*prompt[1:], *said])
    np.testing.assert_array_equal(real, np.arange(len(real)) < real.sum())
    np.testing.assert_array_equal(texts.response[index][response[index]], said)


def slow(tables: Any, batch: Any) -> float:
  """ORPO that imitates prompts too, token by token; a token depends on its place in the text."""
  tokens, means = [], []
  rows: Sequences = batch.sequences
  for b, p in enumerate(batch.preference):
    pair = []
    for k in (0, 1):
      prompt = list(rows.prompt[b, k][rows.prompt_mask[b, k]])
      text = prompt + list(rows.response[b, k][rows.response_mask[b, k]])
      logprobs = []
      for t in range(1, len(text)):
        logits = np.asarray(tables['policy'], np.float64)[t - 1, text[t - 1]]
        logprobs.append(logits[text[t]] - np.log(np.exp(logits).sum()))
      tokens += logprobs if p == 0.5 or (k == 0) == (p > 0.5) else []
      pair.append(np.mean(logprobs[len(prompt) - 1 :]))
    means.append(pair)
  term = orpo(jnp.array(means, jnp.float32), jnp.asarray(batch.preference))
  return float(-np.mean(tokens) + PROMPTED.lam * np.mean(term))


def test_orpo_imitates_prompts() -> None:
  """All tokens but the first, in one mean with those of responses; the odds are of responses.

  Masks, padding and splits are as harmless as they are to every other case.
  """
  batch = tabular.prepared(PROMPTED, make_batch('comparisons'))
  tables, evaluate = make_tables(), tabular.evaluator(PROMPTED, TABLES)
  mean, _, slopes = evaluate(tables, batch)
  np.testing.assert_allclose(mean.value(), slow(tables, batch), rtol=1e-5)
  dirty = evaluate(tables, batches.garbage(batch, np.nan, 4))
  jax.tree.map(np.testing.assert_array_equal, (dirty[0], dirty[2]), (mean, slopes))
  wide = evaluate(make_tables(length=8), batch)
  padded = evaluate(make_tables(length=8), batches.pad(batch, 0, 1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, wide)
  halves = [
    evaluate(tables, jax.tree.map(lambda x, start=start: x[start::2], batch)) for start in (0, 1)
  ]
  np.testing.assert_allclose(halves[0][0].merge(halves[1][0]).value(), mean.value(), rtol=1e-6)
  summed = jax.tree.map(jnp.add, halves[0][2], halves[1][2])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), summed, slopes)


def test_reading_prompts_changes_no_odds() -> None:
  """What a causal policy says of responses does not depend on what else is read of it."""
  batch, tables = make_batch('comparisons'), make_tables()
  rows = batch.sequences
  # The tables know places: prompts without padding, of two tokens, move every response by one.
  full = Sequences(rows.prompt[..., -1:], rows.prompt_mask[..., -1:], rows.response,
                   rows.response_mask)  # fmt: skip
  batch = batch.replace(sequences=full)
  term = {}
  for prompt_nll in (False, True):
    config = ORPOConfig(prompt_nll=prompt_nll)
    mean, _, slopes = tabular.evaluator(config, TABLES)(tables, batch)
    term[prompt_nll] = (mean.value(), slopes)
  # Of a prompt of one token nothing is imitated.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), term[True], term[False]
  )


@pytest.mark.parametrize('value', ['tokens', 'batch', ''])
def test_unknown_normalizations_are_named(value: str) -> None:
  """The error has the field's dotted name."""
  assert_refused(ORPOConfig, {'nll_normalization': value}, 'nll_normalization')
