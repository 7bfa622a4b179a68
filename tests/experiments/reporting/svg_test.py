"""Scales, ticks and escaping."""

import xml.etree.ElementTree as ElementTree

import pytest

from experiments.reporting import svg


@pytest.mark.parametrize(
  ('low', 'high', 'most', 'expected'),
  [
    (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (-0.3, 4.2, 5, [0, 1, 2, 3, 4]),
    (0, 2.4e6, 3, [0, 1e6, 2e6]),
    (-0.002, 0.003, 5, [-0.002, -0.001, 0, 0.001, 0.002, 0.003]),
  ],
)
def test_ticks_are_round_and_inside(low, high, most, expected):
  assert svg.ticks(low, high, most) == pytest.approx(expected)


def test_the_corners_of_the_data_are_the_corners_of_the_plot():
  plot = svg.Plot(width=400, height=300, x_range=(0, 2), y_range=(-1, 1))
  assert (plot.x(0), plot.x(2)) == (plot.left, 400 - plot.right)
  assert (plot.y(-1), plot.y(1)) == (300 - plot.bottom, plot.top)


def test_text_and_attributes_are_escaped():
  drawn = svg.element('g', svg.label(1.0, 2.0, '<b>&"'), aria_label='"><script>')
  node = ElementTree.fromstring(drawn)
  assert node.attrib['aria-label'] == '"><script>'
  assert node[0].text == '<b>&"'
  assert '<script' not in drawn


@pytest.mark.parametrize('shape', svg.MARKERS)
def test_every_marker_is_centred_and_carries_its_tooltip(shape):
  node = ElementTree.fromstring(svg.marker(shape, 50.0, 40.0, 4.0, 'series-0 mark', 'a < b'))
  assert node[0].text == 'a < b'
  if shape != 'circle':
    corners = [tuple(map(float, corner.split(','))) for corner in node.attrib['points'].split()]
    centre = [sum(values) / len(corners) for values in zip(*corners, strict=True)]
    assert centre == pytest.approx([50, 40], abs=0.1)
