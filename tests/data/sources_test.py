"""A config becomes feedback: what derives from what, and what is held out."""

import json
import pathlib
from typing import Any

import pytest

from rlhf_jax.common.errors import DataError
from rlhf_jax.data import sources
from rlhf_jax.data.config import DataConfig, ReviewsConfig
from rlhf_jax.feedback.dataset import Feedback
from rlhf_jax.feedback.records import Comparison, Demonstration, Prompt, Ranking, Rating

PAIRS = [
  {'prompt': f'prompt {row // 2}', 'chosen': f'good {row}', 'rejected': f'bad {row}'}
  for row in range(40)
]


def _file(folder: pathlib.Path, rows: list[dict], name: str = 'data.jsonl') -> str:
  (folder / name).write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
  return str(folder / name)


def _load(path: str, quarantine: pathlib.Path | None = None, **changes: Any) -> Feedback:
  config = DataConfig(source='jsonl', path=path, **changes)
  config.validate('data')
  return sources.load(config, quarantine)


def test_demonstrations_and_prompts_derive_from_comparisons(tmp_path):
  feedback = _load(_file(tmp_path, PAIRS), held_out=0.0)
  assert feedback.train.comparisons == tuple(map(Comparison.from_dict, PAIRS))
  assert feedback.train.demonstrations == tuple(
    Demonstration(pair['prompt'], pair['chosen']) for pair in PAIRS
  )
  assert feedback.train.prompts == tuple(Prompt(f'prompt {i}') for i in range(20))  # each once
  assert feedback.task is None and feedback.bayes_accuracy() is None
  with pytest.raises(DataError, match='no held_out comparisons'):
    feedback.require('held_out', 'comparisons')


def test_all_responses_are_both_of_every_comparison(tmp_path):
  feedback = _load(_file(tmp_path, PAIRS), held_out=0.0, responses='all')
  assert feedback.train.demonstrations[:2] == (
    Demonstration('prompt 0', 'good 0'),
    Demonstration('prompt 0', 'bad 0'),
  )
  assert len(feedback.train.demonstrations) == 2 * len(PAIRS)


def test_demonstrations_give_prompts_but_no_comparisons(tmp_path):
  rows = [{'prompt': f'p {i}', 'response': 'so'} for i in range(10)]
  feedback = _load(_file(tmp_path, rows), held_out=0.0)
  assert len(feedback.train.prompts) == 10
  with pytest.raises(DataError, match='no train comparisons.*Name a source that has comparisons'):
    feedback.require('train', 'comparisons')


@pytest.mark.parametrize('held_out, count', [(0.25, 10), (10.0, 10), (5.0, 6)])
def test_held_out_is_a_share_or_a_count_and_prompts_stay_on_one_side(tmp_path, held_out, count):
  feedback = _load(_file(tmp_path, PAIRS), held_out=held_out)
  assert len(feedback.held_out.comparisons) == count
  assert len(feedback.train.comparisons) == len(PAIRS) - count
  assert not {p.text for p in feedback.train.prompts} & {p.text for p in feedback.held_out.prompts}


def test_what_is_held_out_does_not_depend_on_the_order_of_the_file(tmp_path):
  one = _load(_file(tmp_path, PAIRS), held_out=0.25)
  other = _load(_file(tmp_path, PAIRS[::-1]), held_out=0.25)
  assert set(one.held_out.comparisons) == set(other.held_out.comparisons)


def test_records_with_an_empty_prompt_are_held_out_one_by_one(tmp_path):
  rows = [{'prompt': '', 'response': f'text {i}'} for i in range(20)]
  feedback = _load(_file(tmp_path, rows), held_out=5.0)
  assert len(feedback.held_out.demonstrations) == 5


def test_a_file_of_its_own_can_be_held_out(tmp_path):
  path = _file(tmp_path, PAIRS[:30])
  feedback = _load(path, held_out_path=_file(tmp_path, PAIRS[30:], 'test.jsonl'))
  assert (len(feedback.train.comparisons), len(feedback.held_out.comparisons)) == (30, 10)


def test_holding_everything_out_is_an_error(tmp_path):
  with pytest.raises(DataError, match='no records to learn from .* Lower --config.data.held_out'):
    _load(_file(tmp_path, PAIRS), held_out=40.0)


def test_quarantine_sets_bad_lines_aside_and_counts_them(tmp_path):
  bad = {**PAIRS[0], 'chosen': ''}
  side = tmp_path / 'side.jsonl'
  feedback = _load(_file(tmp_path, [*PAIRS, bad, bad]), side, on_error='quarantine', held_out=0.0)
  assert feedback.quarantined == 2
  assert feedback.train.comparisons == tuple(map(Comparison.from_dict, PAIRS))
  assert len(side.read_text(encoding='utf-8').splitlines()) == 2


def test_a_file_of_bad_lines_alone_is_an_error_even_in_quarantine(tmp_path):
  path = _file(tmp_path, [{'chosen': 'x'}])
  with pytest.raises(DataError, match='no records to learn from .1 set aside'):
    _load(path, tmp_path / 'side.jsonl', on_error='quarantine')


def test_the_fingerprint_is_that_of_the_records(tmp_path):
  one = _load(_file(tmp_path, PAIRS))
  other = _load(_file(tmp_path, [{**pair, 'extra': 1} for pair in PAIRS], 'other.jsonl'))
  changed = _load(_file(tmp_path, PAIRS[:-1] + [{**PAIRS[-1], 'chosen': 'x'}], 'changed.jsonl'))
  assert one.fingerprint == other.fingerprint != changed.fingerprint


def test_the_embedded_task_has_every_kind_and_its_optimum():
  config = DataConfig(
    held_out=20.0,
    reviews=ReviewsConfig(demonstrations=30, comparisons=40, prompts=10),
  )
  feedback = sources.load(config)
  assert len(feedback.require('train', 'prompts')) == 10
  assert len(feedback.require('train', 'demonstrations')) == 30
  assert len(feedback.require('held_out', 'comparisons')) == 20
  assert feedback.task is not None and feedback.bayes_accuracy() is not None
  config.responses = 'all'
  assert len(sources.load(config).train.demonstrations) == 30 + 2 * 40


def test_hh_is_strict_about_its_empty_responses_and_can_be_quarantined(shared_data, tmp_path):
  path = str(shared_data / 'hh_rlhf_test' / 'harmless_base_test.jsonl.gz')
  with pytest.raises(DataError, match=r"gz:\d+: field 'chosen': empty response. 3 more are bad"):
    _load(path)
  feedback = _load(path, tmp_path / 'side.jsonl', on_error='quarantine', held_out=0.25)
  assert feedback.quarantined == 4
  assert len(feedback.held_out.comparisons) >= 577
  assert len(feedback.train.comparisons) + len(feedback.held_out.comparisons) == 2308


RATINGS = [
  {'prompt': f'prompt {row // 2}', 'response': f'text {row}', 'score': row % 3} for row in range(40)
]


def test_ratings_rankings_and_steps_are_read_with_their_prompts(tmp_path):
  ranking = {'prompt': 'p', 'responses': ['a', 'b'], 'best': 1}
  steps = {'prompt': 'p', 'steps': ['a', 'b'], 'scores': [0, 1]}
  for kind, row in (('ratings', RATINGS[0]), ('rankings', ranking), ('step_ratings', steps)):
    feedback = _load(_file(tmp_path, [row]), held_out=0.0)
    assert feedback.train.sizes == {'prompts': 1, kind: 1}
    assert feedback.train.prompts == (Prompt(row['prompt']),)  # type: ignore[arg-type]


def test_each_kind_is_held_out_by_prompt(tmp_path):
  feedback = _load(_file(tmp_path, RATINGS), held_out=0.25)
  assert feedback.held_out.sizes == {'prompts': 5, 'ratings': 10}
  assert not {x.prompt for x in feedback.train.ratings} & {
    x.prompt for x in feedback.held_out.ratings
  }
  rows = [{'prompt': '', 'responses': [f'a {i}', 'b'], 'best': 0} for i in range(20)]
  assert len(_load(_file(tmp_path, rows), held_out=5.0).held_out.rankings) == 5


def test_a_converter_is_applied_to_both_sides_and_more_derives_from_what_it_gives(tmp_path):
  """One setting is enough to fine-tune on, and then compare, what was rated."""
  feedback = _load(_file(tmp_path, RATINGS), held_out=0.25, convert='ratings_to_comparisons')
  assert feedback.train.sizes == {
    'prompts': 15,
    'demonstrations': 15,
    'comparisons': 15,
    'ratings': 30,
  }
  assert feedback.held_out.sizes['comparisons'] == 5
  pair = feedback.train.comparisons[0]
  assert feedback.train.demonstrations[0] == Demonstration(pair.prompt, pair.chosen)
  scores = {x['response']: x['score'] for x in RATINGS}
  assert pair.margin == scores[pair.chosen] - scores[pair.rejected] > 0  # type: ignore[operator]


def test_a_converter_of_what_the_source_lacks_is_an_error(tmp_path):
  with pytest.raises(DataError, match=r'jsonl:.*convert=rankings_to_ratings reads rankings; found'):
    _load(_file(tmp_path, RATINGS), convert='rankings_to_ratings')


def test_the_embedded_task_is_converted_from_its_own_kinds():
  config = DataConfig(
    held_out=6.0,
    reviews=ReviewsConfig(demonstrations=3, comparisons=20, prompts=10, ratings=30, rankings=8),
  )
  plain = sources.load(config)
  config.convert = 'rankings_to_comparisons'
  feedback = sources.load(config)
  assert len(feedback.train.comparisons) == 8 * 6 and len(feedback.held_out.comparisons) == 6 * 6
  assert feedback.bayes_accuracy() is None and plain.bayes_accuracy() is not None
  assert feedback.fingerprint != plain.fingerprint
  first: Ranking = feedback.train.rankings[0]
  assert feedback.train.comparisons[0].prompt == first.prompt
  config.convert = 'comparisons_to_ratings'
  ratings = sources.load(config).require('train', 'ratings')
  pair = plain.train.comparisons[0]
  assert ratings[0] == Rating(pair.prompt, pair.chosen, 1.0, pair.annotator)
  assert len(ratings) == 40


def test_preferred_responses_are_the_chosen_ones_even_beside_demonstrations():
  config = DataConfig(
    held_out=5.0,
    responses='preferred',
    reviews=ReviewsConfig(demonstrations=30, comparisons=20, prompts=10),
  )
  feedback = sources.load(config)
  for side in (feedback.train, feedback.held_out):
    assert side.demonstrations == tuple(
      Demonstration(pair.prompt, pair.chosen) for pair in side.comparisons
    )


def test_preferred_responses_need_comparisons(tmp_path):
  path = _file(tmp_path, RATINGS)
  with pytest.raises(DataError, match="responses='preferred' imitates the chosen .*'ratings': 36"):
    _load(path, responses='preferred')
  converted = _load(path, responses='preferred', convert='ratings_to_comparisons')
  assert len(converted.train.demonstrations) == len(converted.train.comparisons) > 0
