"""Objectives asked to eat what a source does not give: refused at once, with the way out."""

import json
import pathlib
from typing import Any

import pytest

from rlhf_jax import reading, stages
from rlhf_jax.common.errors import DataError
from rlhf_jax.config import InitConfig, RewardModelInitConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.objectives.reward_listwise import ListwiseRewardConfig
from rlhf_jax.recipes import parts
from tests import tiny

ROWS: dict[str, dict[str, Any]] = {
  'comparisons': {'chosen': 'good', 'rejected': 'bad'},
  'ratings': {'response': 'fine', 'score': 0.5},
  'rankings': {'responses': ['good', 'fine', 'bad'], 'ranks': [1, 2, 3]},
  'demonstrations': {'response': 'good'},
  'prompts': {},
}


def write_data(folder: pathlib.Path, kind: str, convert: str = '') -> DataConfig:
  """A file of records of one kind."""
  rows = [{'prompt': f'say {n}', **ROWS[kind]} for n in range(20)]
  return write_rows(folder, rows, convert)


def write_rows(folder: pathlib.Path, rows: list[dict[str, Any]], convert: str = '') -> DataConfig:
  """A file of these records."""
  path = folder / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  return DataConfig(
    source='jsonl',
    path=str(path),
    held_out=4.0,
    prompt_length=4,
    response_length=6,
    convert=convert,
  )


def refused(
  case: str, data: DataConfig, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> str:
  """What a stage says that would have to train its start first, were it let."""
  start = folder / 'sft.py'
  start.write_text('from tests import tiny\ndef get_config(): return tiny.make_config("sft")\n')
  config = tiny.make_config(case, data=data, policy=InitConfig(init=str(start)), **changes)
  monkeypatch.setattr(stages, 'train', lambda *arguments: pytest.fail('a stage was trained'))
  with tiny.devices(1), pytest.raises(DataError) as caught:
    stages.run_stage(config, folder / 'run', root=folder)
  assert not (folder / 'run').exists() and not (folder / 'stages').exists()
  return str(caught.value)


@pytest.mark.parametrize(
  ('case', 'kind', 'needs', 'converter'),
  [
    ('dpo', 'ratings', 'comparisons', 'ratings_to_comparisons'),
    ('cpl', 'rankings', 'comparisons', 'rankings_to_comparisons'),
    ('kto', 'rankings', 'ratings', 'rankings_to_ratings'),
    ('kto', 'comparisons', 'ratings', 'comparisons_to_ratings'),
    ('ilql', 'comparisons', 'ratings', 'comparisons_to_ratings'),
    ('reward_listwise', 'comparisons', 'rankings', 'comparisons_to_rankings'),
    ('reward_model', 'demonstrations', 'comparisons', None),
    ('alol', 'prompts', 'ratings', None),
    ('reward_process', 'ratings', 'step_ratings', None),
  ],
)
def test_a_converter_is_named(
  case: str,
  kind: str,
  needs: str,
  converter: str | None,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """What it needs, what there is, and the flag that makes it; where nothing does, so it says."""
  said = refused(case, write_data(tmp_path, kind), tmp_path, monkeypatch)
  assert f'no train {needs}' in said and f"'{kind}': 16" in said
  if converter is None:
    assert 'no converter makes them' in said
  else:
    assert f'--config.data.convert={converter} (from {kind})' in said


def test_what_is_read_at_the_end_is_asked_for_at_the_start(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A reward model that is to be normalised on demonstrations, where there are none."""
  data = write_data(tmp_path, 'rankings')
  said = refused('reward_listwise', data, tmp_path, monkeypatch)
  assert 'no train demonstrations' in said and 'rankings_to_demonstrations' in said
  assert "--config.objective.normalization='none' does without them" in said


@pytest.mark.parametrize(
  ('case', 'kind', 'convert'),
  [
    ('reward_listwise', 'ratings', 'ratings_to_rankings'),
    ('reward_rating', 'rankings', 'rankings_to_ratings'),
  ],
)
def test_a_converter_does_not_lead_to_another_and_back(
  case: str, kind: str, convert: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """There is one at a time: what learns from converted records is normalised otherwise."""
  rows = [{'prompt': f'say {n}', **ROWS[kind]} for n in range(20)]
  if kind == 'ratings':  # of one prompt, which differ
    rows += [{**row, 'response': 'bad', 'score': -1.0} for row in rows]
  said = refused(case, write_rows(tmp_path, rows, convert), tmp_path, monkeypatch)
  assert 'no train demonstrations' in said and '--config.data.convert' not in said
  assert "--config.objective.normalization='none' does without them" in said


@pytest.mark.parametrize(
  ('scores', 'threshold', 'found'),
  [
    ((1.0, 3.0, 5.0), 0.0, '20 are above objective.threshold=0 and 0 below'),
    ((1.0, 3.0, 5.0), 5.0, '0 are above objective.threshold=5 and 13 below'),
    ((0.5,), 0.5, '0 are above objective.threshold=0.5 and 0 below'),
  ],
)
def test_kto_wants_good_and_bad(
  scores: tuple[float, ...],
  threshold: float,
  found: str,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Ratings from 1 to 5 are all good at a threshold of 0: the field and the counts are named."""
  rows = [
    {'prompt': f'say {n}', 'response': 'so', 'score': scores[n % len(scores)]} for n in range(24)
  ]
  data = write_rows(tmp_path, rows)
  said = refused('kto', data, tmp_path, monkeypatch, objective=KTOConfig(threshold=threshold))
  assert found in said and 'Set --config.objective.threshold between' in said
  config = tiny.make_config('kto', data=data, objective=KTOConfig(threshold=3.0))
  if len(scores) > 1:
    parts.check_records(config, reading.load_data(data, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('convert', 'normalization'), [('', 'none'), ('rankings_to_demonstrations', 'demonstrations')]
)
def test_the_ways_out_lead_out(convert: str, normalization: str, tmp_path: pathlib.Path) -> None:
  """The same stage runs with the converter, or without the normalisation."""
  config = tiny.make_config(
    'reward_listwise',
    steps=1,
    data=write_data(tmp_path, 'rankings', convert),
    objective=ListwiseRewardConfig(normalization=normalization),
  )
  with tiny.devices(1):
    run = stages.run_stage(config, tmp_path / 'run', root=tmp_path).run
  assert run.require_result()['step'] == 1


def test_a_parent_makes_of_the_data_what_its_own_config_says(tmp_path: pathlib.Path) -> None:
  """KTO from ratings and DPO from comparisons of one file start from one policy with one tokenizer.

  A reward model that converts for itself can be the parent of a stage that does not.
  """
  start = tmp_path / 'sft.py'
  file = 'config.data.source, config.data.path = "jsonl", "its child says which"'
  start.write_text(
    'from tests import tiny\ndef get_config():\n  config = tiny.make_config("sft", steps=1)\n'
    f'  {file}\n  return config\n'
  )
  judge = tmp_path / 'judge.py'
  judge.write_text(
    'from tests import tiny\n'
    'def get_config():\n'
    '  config = tiny.make_config("reward_rating", steps=1)\n'
    f'  {file}\n'
    '  config.data.convert = "comparisons_to_ratings"\n'
    f'  config.policy.init = {str(start)!r}\n'
    '  return config\n'
  )
  converted = write_data(tmp_path, 'comparisons', 'comparisons_to_ratings')
  plain = write_data(tmp_path, 'comparisons')
  kto = tiny.make_config('kto', data=converted, policy=InitConfig(init=str(start)))
  dpo = tiny.make_config(
    'dpo',
    data=plain,
    policy=InitConfig(init=str(start)),
    reward_model=RewardModelInitConfig(init=str(judge)),
  )
  with tiny.devices(1):
    first, second = (stages.resolve(config, tmp_path) for config in (kto, dpo))
    assert first.parents['policy'].folder == second.parents['policy'].folder
    alone = [
      parts.load_parts(tiny.make_config('sft', data=data), {}, reading.load_data(data, tmp_path))  # type: ignore[arg-type]
      for data in (plain, converted)
    ]
  assert alone[0].tokenizer.fingerprint == alone[1].tokenizer.fingerprint
