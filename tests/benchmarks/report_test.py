"""Numbers as people read them."""

import pathlib
from typing import Any

import pytest

from benchmarks import report, workloads
from rlhf_jax.common.errors import UserError

PAGE = pathlib.Path(report.__file__).parent / 'RESULTS.md'


def row(median: float) -> dict[str, float]:
  return {'median': median, 'least': median / 2, 'most': median * 2}


def numbers(job: str, **others: Any) -> dict[str, Any]:
  return {
    'job': job,
    'size': 'SMALL',
    'seconds': {'step': {'ours': row(2.0)}},
    'others': 0.01,
    'peak_bytes': {'host': 10**9, 'device': None},
    'peer': None,
    'processor': 'abacus',
    'cores': 2,
    'device': 'cpu',
    'devices': 1,
    'dtype': 'float32',
    'jax': '0.1',
    'revision': 'abc',
    **others,
  }


def against(job: str, **others: Any) -> dict[str, Any]:
  seconds = {'step': {'ours': row(2.0), 'peer': row(3.0), 'ratio': row(1.5)}}
  loaded = {'versions': {'trl': '1.2', 'torch': '3.4'}}
  peer = {'name': 'TRL', 'loaded': loaded, 'peak_bytes': 2 * 10**9}
  return numbers(job, seconds=seconds, peer=peer, **others)


STEPS = {
  'tokens_per_second': 1234.0,
  'utilisation': 0.5,
  'ceiling_flops_per_second': 8e9,
  'first_seconds': {'step': 9.0},
  'compile_seconds': 4.0,
  'loading_seconds': 3.0,
}


def test_lines_hold_both_medians_and_the_paired_ratio() -> None:
  text = '\n'.join(report.lines(against('dpo', **STEPS)))
  assert 'dpo SMALL: step 2.000 s (1.000 to 4.000)' in text
  assert '1,234 tokens/s, 50% of 8 GFLOP/s' in text and '4.0 s of compiling' in text
  assert 'step 3.000 s (1.500 to 6.000): 1.50 times our time (0.75 to 3.00)' in text
  assert 'TRL (trl 1.2, torch 3.4), in turn with it:' in text and 'other processes' not in text
  waits = report.lines(numbers('dpo', **STEPS, idle_share=0.034))
  assert 'the device waits for the host 3% of the time' in waits


def test_lines_hold_memory_and_what_is_inside_a_step() -> None:
  memory = {'host': 10**9, 'device': 5 * 10**9}
  assert 'memory, GB: host 1.00, device 5.00' in report.lines(numbers('dpo', peak_bytes=memory))
  assert 'memory, GB: host 1.00' in report.lines(numbers('load_export'))
  parts = {'rollout': 0.5, 'score': 0.25, 'update': 1.25}
  costliest = [{'program': 'jit_update', 'name': 'mlp/dot_general', 'seconds': 0.5}]
  found = report.lines(numbers('ppo_iteration', parts_seconds=parts, operations=costliest))
  assert 'rollout 0.500 s (25%), score 0.250 s (12%), update 1.250 s (62%)' in found
  assert '  0.5000  jit_update mlp/dot_general' in found
  limits = {'bandwidth_share': 0.75, 'bandwidth_bytes_per_second': 4e9}
  assert 'weights and cache are read at 75% of 4 GB/s' in report.lines(numbers('decode', **limits))
  assert any('loaded in 3.0 s' in line for line in report.lines(numbers('dpo', **STEPS)))


def test_a_machine_that_others_use_is_said() -> None:
  assert report.lines(numbers('dpo', others=0.27))[-1].startswith(
    'other processes used 27% of the cores'
  )
  assert 'other' not in report.lines(numbers('dpo', others=None))[-1]


def test_the_table_has_a_row_for_each_part() -> None:
  parts = {'load': {'ours': row(1.0)}, 'export': {'ours': row(2.0)}}
  speeds = {'load': 4e9, 'export': 2e9}
  folder = numbers('load_export', seconds=parts, bytes=4 * 10**9, bytes_per_second=speeds)
  other = against('ppo_iteration')
  other['peer']['loaded'] = {'versions': {'trl': '1.1', 'torch': '3.4'}}
  text = report.table([against('dpo', **STEPS), folder | {'revision': 'abd'}, other])
  where, _, *lines = text.splitlines()
  assert (
    where == 'abacus, 2 cores; cpu with jax 0.1; revision abc, abd; trl 1.2 and 1.1; torch 3.4.'
  )
  assert '| TRL, s | TRL / ours | Memory, GB: ours, TRL |' in lines[0]
  lines, behind = lines[: lines.index('')], lines[lines.index('') + 1 :]
  assert [line.split(' | ')[:2] for line in lines[2:]] == [
    ['| dpo', 'step'],
    ['| load_export', 'load'],
    ['| load_export', 'export'],
    ['| ppo_iteration', 'step'],
  ]
  assert {line.count('|') for line in lines} == {len(lines[0].split('|')) - 1}
  assert '| 1.500 (0.750 to 3.000) |' not in lines[2] and '| 1.50 (0.75 to 3.00) |' in lines[2]
  assert '4.00 GB/s' in lines[3] and '1.00, 2.00' in lines[2]
  assert [line.split(' | ')[0] for line in behind[2:]] == [
    '| dpo',
    '| load_export',
    '| ppo_iteration',
  ]


def test_the_other_table_has_what_is_behind_our_numbers() -> None:
  parts = {'rollout': 0.5, 'score': 0.25, 'update': 1.25}
  memory = {'host': 10**9, 'device': 5 * 10**9}
  first = numbers('ppo_iteration', **STEPS, idle_share=0.25, parts_seconds=parts, peak_bytes=memory)
  second = numbers('decode', **STEPS, idle_share=0.0, bandwidth_share=0.75)
  *_, head, _, one, other = report.table([first, second]).splitlines()
  assert one == '| ppo_iteration | 8 |  | 4.0 | 25% | 0.500, 0.250, 1.250 | 1.00, 5.00 |'
  assert other == '| decode | 8 | 75% | 4.0 | 0% |  | 1.00 |'
  assert head.count('|') == one.count('|') == other.count('|')


def test_devices_and_types_that_are_not_the_usual_ones_are_said() -> None:
  where = report.table([numbers('dpo', devices=4, dtype='bfloat16')]).splitlines()[0]
  assert 'cpu with jax 0.1 on 4 devices in bfloat16; ' in where


def test_a_page_keeps_what_is_around_a_table() -> None:
  page = PAGE.read_text()
  for size in workloads.SIZES:
    changed = report.put(page, size, 'new \\1')
    assert f'<!-- {size} -->\nnew \\1\n<!-- end -->' in changed
    assert changed.split(f'<!-- {size} -->')[0] == page.split(f'<!-- {size} -->')[0]
  with pytest.raises(UserError, match='expected a page with <!-- HUGE -->'):
    report.put(page, 'HUGE', '')
