"""A summary as report.html: one file without scripts, fonts or pictures from elsewhere."""

import pathlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.reporting import charts, tables, text
from experiments.reporting.svg import element

_STYLE = pathlib.Path(__file__).with_name('style.css')


def render(summary: Mapping[str, Any]) -> str:
  """The whole page; every text from the study is escaped."""
  study = summary.get('study', {})
  title = escape(study.get('title', 'Comparison'))
  head = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f'<title>{title}</title><style>{_STYLE.read_text()}</style>'
  )
  sections = [
    element('h1', title),
    _findings(summary['findings']),
    _frontier(summary),
    _section('Final results', _final(summary)),
    _matched(summary),
    _section('Learning curves', _curves(summary)),
    _section('Reward model', element('p', escape(tables.reward_model_text(summary)))),
    _completions(summary.get('completions', ())),
    _section('How it was measured', _method(summary)),
  ]
  body = element('main', *sections)
  return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _section(title: str, *content: str) -> str:
  return element('section', element('h2', escape(title)), *content)


def _findings(findings: Sequence[str]) -> str:
  if not findings:
    said = element('strong', 'No warnings.')
    checked = (
      ' Nothing lies above the optimum beyond its interval, and no other check of this report '
      'found anything.'
    )
    return element('div', element('p', said, checked), class_='fine')
  items = ''.join(element('li', escape(finding)) for finding in findings)
  many = 'One warning' if len(findings) == 1 else f'{len(findings)} warnings'
  return element('div', element('h2', many), element('ul', items), class_='warnings', role='alert')


def _frontier(summary: Mapping[str, Any]) -> str:
  caption = (
    'Gold reward against KL along the training of each objective, starting from the model that all '
    'share. Marks are evaluations over all seeds, with 95% intervals of both; faint lines are '
    'single seeds.'
  )
  if summary['optimum']:
    caption += (
      ' The grey curve is the best that any policy can do at that KL, with its 95% band: a mark '
      'above it, beyond the intervals, gets a red ring: some estimate is wrong.'
    )
  return element(
    'figure',
    charts.legend(summary, frontier=True),
    charts.frontier_chart(summary, 860, 500, 'wide'),
    charts.frontier_chart(summary, 400, 400, 'narrow'),
    element('figcaption', escape(caption)),
  )


def _final(summary: Mapping[str, Any]) -> str:
  return (
    _table(tables.final_table(summary, pooled=True), stacked=True)
    + element(
      'p',
      'The last step of each objective over all its seeds. 95% intervals in brackets; gold reward '
      'in nats of log-odds, KL in nats per sequence.',
      class_='note',
    )
    + element(
      'details',
      element('summary', 'Each seed'),
      _table(tables.final_table(summary, pooled=False), stacked=True),
    )
  )


def _matched(summary: Mapping[str, Any]) -> str:
  matched = tables.matched_table(summary)
  return _section('At equal KL', _table(matched, names=2)) if matched is not None else ''


def _curves(summary: Mapping[str, Any]) -> str:
  drawings = ''.join(charts.learning_curves(summary, 430, 270))
  caption = (
    'Means over seeds with 95% bands; faint lines are single seeds, the dashed line the start.'
  )
  return element(
    'figure',
    charts.legend(summary, frontier=False),
    element('div', drawings, class_='panels'),
    element('figcaption', caption),
  )


def _completions(completions: Sequence[Mapping[str, Any]]) -> str:
  if not completions:
    return ''
  parts = []
  for prompt in dict.fromkeys(sample['prompt'] for sample in completions):
    rows = []
    for sample in (sample for sample in completions if sample['prompt'] == prompt):
      gold = text.number(sample['gold_reward'])
      cells = element('th', escape(sample['objective']), scope='row')
      cells += element('td', gold) + element('td', escape(sample['response']), class_='response')
      rows.append(element('tr', cells))
    names = ('Objective', 'Gold reward', 'Response')
    head = element('tr', *(element('th', name, scope='col') for name in names))
    shown = element('table', element('thead', head), element('tbody', *rows), class_='samples')
    parts.append(element('h3', escape(prompt), ' …') + element('div', shown, class_='scroll'))
  return _section('Samples', *parts)


def _method(summary: Mapping[str, Any]) -> str:
  study = summary.get('study', {})
  facts = ''.join(
    element('dt', escape(name)) + element('dd', escape(said))
    for name, said in tables.method(summary)
  )
  parts = [element('dl', facts)]
  if study.get('command'):
    parts.append(element('p', 'The study and this report are made again by'))
    parts.append(element('pre', element('code', escape(study['command']))))
  if study.get('environment'):
    rows = ', '.join(f'{name} {said}' for name, said in study['environment'])
    parts.append(element('p', escape(rows), class_='note'))
  return ''.join(parts)


def _table(content: tables.Table, names: int = 1, stacked: bool = False) -> str:
  """A table that scrolls sideways on a narrow screen; the first `names` columns are names.

  `stacked` puts intervals under their means. An empty first cell continues the row above.
  """
  head = element('tr', *(element('th', escape(name), scope='col') for name in content.header))
  rows = []
  for row in content.rows:
    cells = [element('th', escape(cell), scope='row') for cell in row[:names]]
    for cell in row[names:]:
      mean, bracket, ends = cell.partition(' [')
      interval = element('span', escape(bracket + ends), class_='ends') if bracket else ''
      cells.append(element('td', escape(mean), interval))
    rows.append(element('tr', *cells, **({} if row[0] else {'class_': 'same'})))
  body = element('tbody', *rows)
  return element(
    'div',
    element('table', element('thead', head), body, class_='stacked' if stacked else 'plain'),
    class_='scroll',
  )
