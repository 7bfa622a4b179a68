"""A summary as report.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.reporting import tables, text


def render(summary: Mapping[str, Any]) -> str:
  """The whole report; every text from the study is escaped, so that it shows as it was written."""
  study = summary.get('study', {})
  parts = [f'# {escape(study.get("title", "Comparison"))}', *_findings(summary['findings'])]
  parts += ['## Final results', table(tables.final_table(summary, pooled=True))]
  parts.append(
    '95% intervals in brackets; gold reward in nats of log-odds, KL in nats per sequence.'
  )
  matched = tables.matched_table(summary)
  if matched is not None:
    parts += ['## At equal KL', table(matched)]
  parts += ['## Each seed', table(tables.final_table(summary, pooled=False))]
  parts += ['## Reward model', escape(tables.reward_model_text(summary))]
  parts += _completions(summary.get('completions', ()))
  parts.append('## How it was measured')
  parts.append(
    '\n'.join(f'- **{escape(n)}.** {escape(said)}' for n, said in tables.method(summary))
  )
  if study.get('command'):
    parts += ['The study and this report are made again by', fence(study['command'])]
  if study.get('environment'):
    parts.append('\n'.join(f'- {escape(n)}: {escape(said)}' for n, said in study['environment']))
  return '\n\n'.join(parts) + '\n'


def escape(content: str) -> str:
  """Text that Markdown shows as it is: one line, no markup, no HTML, no column ends."""
  line = ' '.join(content.split())
  line = line.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  return re.sub(r'([\\`*_\[\]|#~])', r'\\\1', line)


def table(content: tables.Table) -> str:
  """A table with its numbers to the right."""
  lines = [content.header, [':--', *['--:'] * (len(content.header) - 1)]]
  shown = [[escape(cell) for cell in row] for row in content.rows]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [*lines, *shown])


def fence(content: str) -> str:
  """A code block whose fence is longer than any run of backticks inside."""
  ticks = max((len(run) for run in re.findall(r'`+', content)), default=0)
  marks = '`' * max(3, ticks + 1)
  return f'{marks}sh\n{content}\n{marks}'


def _findings(findings: Sequence[str]) -> Iterator[str]:
  if not findings:
    yield 'No warnings.'
    return
  yield '## Warnings'
  yield '\n'.join(f'- ⚠️ {escape(finding)}' for finding in findings)


def _completions(completions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  if not completions:
    return
  yield '## Samples'
  for prompt in dict.fromkeys(sample['prompt'] for sample in completions):
    rows = [
      [sample['objective'], text.number(sample['gold_reward']), sample['response']]
      for sample in completions
      if sample['prompt'] == prompt
    ]
    yield f'**{escape(prompt)}** …'
    yield table(tables.Table(['Objective', 'Gold reward', 'Response'], rows))
