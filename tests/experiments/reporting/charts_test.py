"""The charts put what was measured where it belongs."""

import copy
import re
import xml.etree.ElementTree as ElementTree

import pytest

from experiments.reporting import charts, page


def nodes(drawing, class_):
  found = ElementTree.fromstring(drawing).iter()
  return [node for node in found if node.get('class', '').split() == class_.split()]


def test_each_pooled_point_has_a_mark_and_two_intervals(summary):
  drawing = charts.frontier_chart(summary, 860, 500, 'wide')
  for index in range(2):
    assert len(nodes(drawing, f'series-{index} mark')) == 2
    assert len(nodes(drawing, f'series-{index} interval')) == 4
    assert len(nodes(drawing, f'series-{index} line')) == 1
    assert len(nodes(drawing, f'series-{index} faint')) == 2
  assert len(nodes(drawing, 'optimum-band')) == 1
  assert len(nodes(drawing, 'start')) == 1
  assert not nodes(drawing, 'alarm')


def test_all_that_is_drawn_lies_inside_the_drawing(summary):
  for drawing, width, height in [
    (charts.frontier_chart(summary, 400, 380, 'narrow'), 400, 380),
    *((panel, 430, 270) for panel in charts.learning_curves(summary, 430, 270)),
  ]:
    for path in re.findall(r' d="M([^"Z]*)', drawing):
      for point in path.split('L'):
        x, y = map(float, point.split())
        assert 0 <= x <= width and 0 <= y <= height


def test_a_point_above_the_optimum_gets_a_red_ring(summary):
  wrong = copy.deepcopy(summary)
  row = next(row for row in wrong['rows'] if row['objective'] == 'dpo' and row['seed'] == 1)
  row['gold_reward'] = {'mean': 9.0, 'low': 8.9, 'high': 9.1}
  assert len(nodes(charts.frontier_chart(wrong, 860, 500, 'wide'), 'alarm')) == 1


def test_past_the_samples_reach_the_optimum_is_a_dotted_bound(summary):
  far = copy.deepcopy(summary)
  far['optimum'] = far['optimum'][:6]
  drawing = charts.frontier_chart(far, 860, 500, 'wide')
  assert len(nodes(drawing, 'optimum-bound')) == 1


def test_learning_curves_show_four_metrics_from_the_start_on(summary):
  panels = charts.learning_curves(summary, 430, 270)
  assert len(panels) == 4
  for panel in panels:
    for line in nodes(panel, 'series-0 line'):
      assert line.attrib['d'].startswith('M52.0 ')  # at no tokens: the left end of the plot
      assert line.attrib['d'].count('L') == 2  # the start and two evaluations
  assert len(nodes(panels[2], 'budget')) == 1


def test_twenty_four_series_are_told_apart(summary):
  """No two look alike; of the same colour neither dash nor mark is the same; all is in the legend.

  With so many, names are in the legend alone.
  """
  looks = [charts.Look.of(index) for index in range(24)]
  assert len(set(looks)) == 24
  for colour in {look.colour for look in looks}:
    same = [look for look in looks if look.colour == colour]
    assert len(same) == len({look.line for look in same}) == len({look.shape for look in same}) == 4
  many = copy.deepcopy(summary)
  rows = [row for row in summary['rows'] if row['objective'] == 'ppo']
  many['rows'] += [{**row, 'objective': f'x{number}'} for number in range(22) for row in rows]
  for drawing in (
    charts.legend(many, frontier=False),
    charts.frontier_chart(many, 860, 500, 'wide'),
    *charts.learning_curves(many, 430, 270),
  ):
    for look in looks:
      assert len(nodes(drawing, look.line)) == 1
  style = page._STYLE.read_text()
  for look in looks:
    for class_ in look.line.split():
      assert f'.{class_} {{' in style
  drawing = charts.frontier_chart(many, 860, 500, 'wide')
  assert not nodes(drawing, 'series-0 label')
  assert nodes(charts.frontier_chart(summary, 860, 500, 'wide'), 'series-0 label')


def test_labels_that_would_touch_are_moved_apart():
  labels = [(10.0, 20.0, 'ppo', 'a'), (12.0, 22.0, 'dpo', 'b'), (300.0, 21.0, 'cpl', 'c')]
  placed = {name: y for _, y, name, _ in charts._apart(labels)}
  assert placed['dpo'] - placed['ppo'] >= 14
  assert placed['cpl'] == 21.0


@pytest.mark.parametrize('without', ['rows', 'optimum'])
def test_a_study_may_lack_results_or_optimum(summary, without):
  drawing = charts.frontier_chart({**summary, without: []}, 860, 500, 'wide')
  ElementTree.fromstring(drawing)
