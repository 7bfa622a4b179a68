"""The charts of a report: the reward-KL frontier, and learning curves. Inline SVG, no scripts."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.reporting import svg, text
from experiments.reporting.evaluations import START
from rlhf_jax.evaluation import frontier as frontier_lib
from rlhf_jax.evaluation.frontier import FrontierPoint

Row = Mapping[str, Any]
# How many colours and dashes of lines the style sheet has. Of 24 series those of one colour differ
# in dash and in mark; further ones go round again.
COLOURS, DASHES = 6, 4
# Names stand beside so many curves at most; of more they would cover the marks, and the legend has
# them.
_LABELLED = 8

GOLD = 'Gold reward (nats of log-odds)'
KL = 'KL to the start (nats per sequence)'
_PANELS = (
  ('gold_reward', 'Gold reward', 'nats of log-odds'),
  ('proxy_reward', 'Proxy reward', 'reward model, normalised'),
  ('kl', 'KL to the start', 'nats per sequence'),
  ('length', 'Response length', 'tokens'),
)


class Look(NamedTuple):
  """How a series looks: the classes of its colour and of its pooled line, and its mark's shape."""

  colour: str
  line: str
  shape: str

  @classmethod
  def of(cls, index: int) -> 'Look':
    """That of the series of this number."""
    turn, colour = divmod(index, COLOURS)
    turn %= DASHES
    line = f'series-{colour} line' + (f' dash-{turn}' if turn else '')
    return cls(f'series-{colour}', line, svg.MARKERS[(colour + turn) % len(svg.MARKERS)])


def compared(summary: Mapping[str, Any]) -> list[str]:
  """The objectives apart from the start, in their order."""
  names = dict.fromkeys(row['objective'] for row in summary['rows'])
  return [name for name in names if name != START]


def rows_of(summary: Mapping[str, Any], objective: str, seed: int | None) -> list[Row]:
  """One curve, by step."""
  return sorted(
    (row for row in summary['rows'] if row['objective'] == objective and row['seed'] == seed),
    key=lambda row: row['step'],
  )


def seeds_of(summary: Mapping[str, Any], objective: str) -> list[int]:
  """The seeds of an objective, ascending."""
  seeds = {row['seed'] for row in summary['rows'] if row['objective'] == objective}
  return sorted(seed for seed in seeds if seed is not None)


def start_row(summary: Mapping[str, Any]) -> Row | None:
  """The pooled row of the model that every objective starts from, if it was evaluated."""
  rows = rows_of(summary, START, None)
  return rows[-1] if rows else None


def curve(summary: Mapping[str, Any], objective: str, seed: int | None) -> list[Row]:
  """One curve with the start before it, unless step 0 was evaluated; the start costs no tokens."""
  rows = rows_of(summary, objective, seed)
  start = start_row(summary)
  if start is None or not rows or rows[0]['step'] == 0:
    return rows
  return [{**start, 'tokens': 0, 'seconds': 0.0}, *rows]


def legend(summary: Mapping[str, Any], *, frontier: bool) -> str:
  """HTML: the mark and the name of each series; start and optimum for the frontier chart only."""
  items = []
  for index, objective in enumerate(compared(summary)):
    look = Look.of(index)
    swatch = svg.element('path', d='M1 8H47', class_=look.line) + svg.marker(
      look.shape, 24.0, 8.0, 4.5, f'{look.colour} mark'
    )
    items.append((swatch, objective))
  if frontier and start_row(summary):
    items.append((svg.marker('circle', 24.0, 8.0, 5.0, 'start'), f'{START} (the start)'))
  if frontier and summary['optimum']:
    swatch = svg.element('rect', x=1, y=2, width=46, height=12, class_='optimum-band')
    swatch += svg.element('path', d='M1 8H47', class_='optimum-line')
    items.append((swatch, 'optimum, 95% band'))
  keys = ''.join(
    svg.element(
      'span', svg.element('svg', swatch, viewBox='0 0 48 16', class_='key'), html.escape(name)
    )
    for swatch, name in items
  )
  return svg.element('div', keys, class_='legend')


def frontier_chart(summary: Mapping[str, Any], width: float, height: float, class_: str) -> str:
  """Gold reward against KL along each objective's training, under the best there is at each KL."""
  optimum = [FrontierPoint.from_dict(point) for point in summary['optimum']]
  start = start_row(summary)
  curves = {name: curve(summary, name, None) for name in compared(summary)}
  impossible = [row for row in summary['rows'] if _impossible(row, optimum)]
  pooled = [row for rows in curves.values() for row in rows] + ([start] if start else [])
  singles = [row for row in summary['rows'] if row['objective'] != START] + impossible
  reach = _reach(pooled, singles)
  best = _optimum_points(optimum, reach)
  ends = [row['gold_reward'][end] for row in pooled for end in ('low', 'high')]
  ends += [row['gold_reward']['mean'] for row in singles]
  ends += [value for _, interval, _ in best for value in (interval.low, interval.high)]
  plot = svg.Plot(
    width=width, height=height, x_range=(-0.02 * reach, reach), y_range=_padded(ends), right=30.0
  )
  parts = [plot.axes(KL, GOLD), _optimum(plot, best)]
  labels = []
  for index, (name, rows) in enumerate(curves.items()):
    parts.append(_path_with_intervals(plot, summary, name, rows, index))
    if rows and len(curves) <= _LABELLED:
      x, y = plot.x(rows[-1]['kl']['mean']), plot.y(rows[-1]['gold_reward']['mean'])
      labels.append((x + 7, y - 7, name, f'{Look.of(index).colour} label'))
  if start:
    x, y = plot.x(start['kl']['mean']), plot.y(start['gold_reward']['mean'])
    parts.append(plot.cross(_ends(start['kl']), _ends(start['gold_reward']), 'start-interval'))
    parts.append(svg.marker('circle', x, y, 5.0, 'start', _tooltip(start)))
    labels.append((x + 9, y + 16, START, 'start-label'))
  if best:
    x, y = plot.x(best[-1][0]), plot.y(best[-1][1].high) - 7
    parts.append(svg.label(x, y, 'optimum', class_='start-label', text_anchor='end'))
  parts += [_alarm(plot, row) for row in impossible]
  parts += [svg.label(x, y, name, class_=kind) for x, y, name, kind in _apart(labels)]
  return plot.drawing('Gold reward against KL to the start', ''.join(parts), class_)


def learning_curves(summary: Mapping[str, Any], width: float, height: float) -> list[str]:
  """Gold reward, proxy reward, KL and length against tokens seen: one drawing each."""
  drawings = []
  start = start_row(summary)
  budget = summary.get('study', {}).get('kl_budget')
  pooled = {name: curve(summary, name, None) for name in compared(summary)}
  tokens = max([row['tokens'] for rows in pooled.values() for row in rows], default=0) or 1
  for metric, title, unit in _PANELS:
    ends = [row[metric][end] for rows in pooled.values() for row in rows for end in ('low', 'high')]
    ends += [start[metric]['mean']] if start else []
    ends += [budget] if metric == 'kl' and budget is not None else []
    plot = svg.Plot(
      width=width, height=height, x_range=(0.0, tokens * 1.03), y_range=_padded(ends), top=30.0
    )
    parts = [
      plot.axes('Tokens seen in training', unit, text.count),
      svg.label(plot.left, 16.0, title, class_='heading'),
    ]
    if metric == 'kl' and budget is not None:
      parts.append(plot.line([(0, budget), (tokens * 1.03, budget)], 'budget'))
      parts.append(
        svg.label(
          width - plot.right, plot.y(budget) - 5, 'budget', class_='tick', text_anchor='end'
        )
      )
    elif start:
      parts.append(
        plot.line(
          [(0, start[metric]['mean']), (tokens * 1.03, start[metric]['mean'])], 'start-level'
        )
      )
    for index, (name, rows) in enumerate(pooled.items()):
      parts.append(_curve_with_band(plot, summary, name, rows, metric, index))
    drawings.append(plot.drawing(f'{title} against tokens seen', ''.join(parts)))
  return drawings


def _curve_with_band(
  plot: svg.Plot,
  summary: Mapping[str, Any],
  name: str,
  rows: Sequence[Row],
  metric: str,
  index: int,
) -> str:
  look = Look.of(index)
  xs = [row['tokens'] for row in rows]
  parts = []
  if rows:
    lows, highs = ([row[metric][end] for row in rows] for end in ('low', 'high'))
    parts.append(plot.band(xs, lows, highs, f'{look.colour} band'))
    means = [(x, row[metric]['mean']) for x, row in zip(xs, rows, strict=True)]
    parts.append(plot.line(means, look.line))
  for seed in seeds_of(summary, name):
    points = [(row['tokens'], row[metric]['mean']) for row in curve(summary, name, seed)]
    parts.append(plot.line(points, f'{look.colour} faint') if points else '')
  for row in rows:
    if row['objective'] != START:
      where = plot.x(row['tokens']), plot.y(row[metric]['mean'])
      tip = f'{text.who(row)}: {text.interval(row[metric])}'
      parts.append(svg.marker(look.shape, *where, 3.2, f'{look.colour} mark', tip))
  return ''.join(parts)


def _path_with_intervals(
  plot: svg.Plot, summary: Mapping[str, Any], name: str, rows: Sequence[Row], index: int
) -> str:
  """One objective on the frontier chart: faint seeds, and its pooled points with both intervals."""
  look = Look.of(index)
  parts = []
  for seed in [*seeds_of(summary, name), None]:
    points = [(row['kl']['mean'], row['gold_reward']['mean']) for row in curve(summary, name, seed)]
    kind = look.line if seed is None else f'{look.colour} faint'
    parts.append(plot.line(points, kind) if points else '')
  for row in rows:
    if row['objective'] != START:
      where = plot.x(row['kl']['mean']), plot.y(row['gold_reward']['mean'])
      ends = _ends(row['kl']), _ends(row['gold_reward'])
      parts.append(plot.cross(*ends, f'{look.colour} interval'))
      parts.append(svg.marker(look.shape, *where, 4.2, f'{look.colour} mark', _tooltip(row)))
  return ''.join(parts)


def _reach(pooled: Sequence[Row], singles: Sequence[Row]) -> float:
  """How far the KL axis goes: over all intervals of pooled points and all means of single seeds."""
  ends = [row['kl']['high'] for row in pooled] + [row['kl']['mean'] for row in singles]
  reach = 1.04 * max(ends, default=0.0)
  return reach if reach > 0 else 1.0


def _impossible(row: Row, optimum: Sequence[FrontierPoint]) -> bool:
  kl, gold = (frontier_lib.Interval.from_dict(row[name]) for name in ('kl', 'gold_reward'))
  return bool(optimum) and frontier_lib.above_frontier(kl, gold, optimum)


def _alarm(plot: svg.Plot, row: Row) -> str:
  """A red ring around a point that cannot be; smaller for a single seed."""
  where = plot.x(row['kl']['mean']), plot.y(row['gold_reward']['mean'])
  return svg.marker('circle', *where, 10.0 if row['seed'] is None else 6.0, 'alarm', _tooltip(row))


def _optimum_points(
  optimum: Sequence[FrontierPoint], reach: float
) -> list[tuple[float, frontier_lib.Interval, bool]]:
  """(KL, optimum, whether it is only an upper bound) up to `reach`."""
  if not optimum:
    return []
  points = [(point.kl, point.gold_reward, False) for point in optimum if point.kl < reach]
  if optimum[-1].kl < reach:
    return [*points, (reach, frontier_lib.frontier_at(optimum, reach), True)]
  return [*points, (reach, frontier_lib.frontier_at(optimum, reach), False)]


def _optimum(plot: svg.Plot, best: Sequence[tuple[float, frontier_lib.Interval, bool]]) -> str:
  known = [point for point in best if not point[2]]
  parts = []
  if known:
    lows, highs = [p[1].low for p in known], [p[1].high for p in known]
    parts.append(plot.band([p[0] for p in known], lows, highs, 'optimum-band'))
    parts.append(plot.line([(p[0], p[1].mean) for p in known], 'optimum-line'))
  if known and best[-1][2]:
    bound = [(p[0], p[1].mean) for p in (known[-1], best[-1])]
    parts.append(plot.line(bound, 'optimum-bound'))
  return ''.join(parts)


def _apart(labels: Sequence[tuple[float, float, str, str]]) -> list[tuple[float, float, str, str]]:
  """Moves labels that would touch apart, downwards from the highest."""
  placed: list[tuple[float, float, str, str]] = []
  for x, y, name, kind in sorted(labels, key=lambda item: item[1]):
    for other in placed:
      near = x < other[0] + 8 * len(other[2]) and other[0] < x + 8 * len(name)
      if near and y < other[1] + 14:
        y = other[1] + 14
    placed.append((x, y, name, kind))
  return placed


def _ends(estimate: Mapping[str, float]) -> tuple[float, float, float]:
  return estimate['mean'], estimate['low'], estimate['high']


def _padded(values: Sequence[float]) -> svg.Point:
  """A range that holds all values with some room; one that is not empty for a constant."""
  low, high = min(values, default=0.0), max(values, default=1.0)
  room = 0.05 * (high - low) if not math.isclose(low, high) else 0.5 + 0.05 * abs(high)
  return low - room, high + room


def _tooltip(row: Row) -> str:
  return (
    f'{text.who(row)}: gold {text.interval(row["gold_reward"])}, KL {text.interval(row["kl"])}, '
    f'{text.count(row["tokens"])} tokens'
  )
