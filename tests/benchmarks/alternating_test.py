"""Two ways of a stage are timed in turn."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks import alternating, workloads
from tests.benchmarks.timing_test import tiny_sizes as tiny_sizes


def test_ragged_texts_have_up_to_the_tokens_of_their_job() -> None:
  job = workloads.job_of('dpo_ragged', 'SMALL')
  lengths = [len(row['prompt'].split()) for row in workloads.comparisons('SMALL', job)]
  assert 1 <= min(lengths) < 4 and job.prompt / 2 < max(lengths) < job.prompt


@pytest.mark.slow
@pytest.mark.parametrize('way', ['length_buckets', 'pack'])
def test_both_ways_make_their_steps(
  way: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  ways = alternating.WAYS[way]._replace(steps=2)
  job = workloads.RAGGED[ways.job]
  monkeypatch.setitem(workloads.RAGGED, ways.job, dataclasses.replace(job, response=8))
  numbers = alternating.compare(ways, 'SMALL', 'float32', 2, tmp_path)
  json.dumps(numbers)
  assert numbers['faster']['least'] > 0 and numbers['less_processor_time']['median'] > 0
