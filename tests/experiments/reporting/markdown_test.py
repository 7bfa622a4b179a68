"""report.md shows texts as they were written, and tables of one shape."""

import re

from experiments.reporting import markdown


def test_nothing_that_a_study_says_becomes_markup(summary):
  """Outside code blocks no tag is left, and each line of a table has the columns of its head."""
  rendered = markdown.render({**summary, 'findings': ['ppo <img src=x> | wrong']})
  assert '<script' not in rendered and '<img' not in rendered and '<b>' not in rendered
  for block in re.findall(r'(?:^\|.*\n)+', rendered, re.MULTILINE):
    columns = {len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}
    assert len(columns) == 1


def test_the_report_has_findings_results_and_the_command(summary):
  rendered = markdown.render({**summary, 'findings': ['something is wrong']})
  assert '## Warnings\n\n- ⚠️ something is wrong' in rendered
  for part in ('## Final results', '## At equal KL', '## Reward model', '## How it was measured'):
    assert part in rendered
  assert '````sh\nmake quickstart  # ```\n````' in rendered
  assert 'No warnings.' in markdown.render({**summary, 'findings': []})


def test_escaped_text_is_one_line():
  assert markdown.escape('a\n| b_c') == r'a \| b\_c'
