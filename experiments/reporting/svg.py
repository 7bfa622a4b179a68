"""The little SVG that our charts need: escaped elements, scales, axes, bands and markers.

Colours come from the page: a mark takes the class of its series (`series-0`, ...) and the style
sheet says what that looks like, so that one drawing serves light and dark.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

Point = tuple[float, float]
MARKERS = ('circle', 'square', 'triangle', 'diamond', 'pentagon', 'star')


def element(tag: str, *children: str, **attributes: object) -> str:
  """`<tag attributes>children</tag>`; attributes are escaped, children are markup already.

  `class_` gives `class`, and an underscore gives a hyphen: `stroke_width`. Floats are rounded.
  """
  parts = [tag]
  for name, value in attributes.items():
    shown = f'{value:.2f}'.rstrip('0').rstrip('.') if isinstance(value, float) else str(value)
    key = name.rstrip('_') if name == 'viewBox' else name.rstrip('_').replace('_', '-')
    parts.append(f'{key}="{html.escape(shown)}"')
  return f'<{" ".join(parts)}>{"".join(children)}</{tag}>'


def label(x: float, y: float, content: str, **attributes: object) -> str:
  """A line of text, escaped."""
  return element('text', html.escape(content), x=x, y=y, **attributes)


def ticks(low: float, high: float, most: int) -> list[float]:
  """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
  raw = (high - low) / max(most, 1)
  power = 10.0 ** math.floor(math.log10(raw))
  step = power * next(size for size in (1, 2, 5, 10) if size * power >= raw * (1 - 1e-9))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [index * step for index in range(first, last + 1)]


def tick_text(value: float) -> str:
  return f'{value:.10g}' if abs(value) > 1e-12 else '0'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
  """A drawing area in pixels and the ranges of data shown in it."""

  width: float
  height: float
  x_range: Point
  y_range: Point
  left: float = 52.0
  right: float = 14.0
  top: float = 12.0
  bottom: float = 44.0

  def x(self, value: float) -> float:
    low, high = self.x_range
    return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

  def y(self, value: float) -> float:
    low, high = self.y_range
    return (
      self.height
      - self.bottom
      - (value - low) / (high - low) * (self.height - self.top - self.bottom)
    )

  def axes(
    self,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] = tick_text,
    y_text: Callable[[float], str] = tick_text,
  ) -> str:
    """Grid lines, tick texts and the names of the axes."""
    floor, wall = self.height - self.bottom, self.width - self.right
    parts = []
    for value in ticks(*self.x_range, most=max(int((wall - self.left) / 75), 2)):
      x = self.x(value)
      parts.append(element('line', x1=x, x2=x, y1=self.top, y2=floor, class_='grid'))
      parts.append(label(x, floor + 16, x_text(value), class_='tick', text_anchor='middle'))
    for value in ticks(*self.y_range, most=max(int((floor - self.top) / 45), 2)):
      y = self.y(value)
      parts.append(element('line', x1=self.left, x2=wall, y1=y, y2=y, class_='grid'))
      text = y_text(value)
      parts.append(label(self.left - 7, y + 4, text, class_='tick', text_anchor='end'))
    parts.append(element('line', x1=self.left, x2=wall, y1=floor, y2=floor, class_='axis'))
    middle, half = (self.left + wall) / 2, (self.top + floor) / 2
    parts.append(label(middle, self.height - 8, x_label, class_='name', text_anchor='middle'))
    turn = f'rotate(-90 14 {half:.1f})'
    if y_label:
      parts.append(label(14.0, half, y_label, class_='name', text_anchor='middle', transform=turn))
    return ''.join(parts)

  def line(self, points: Sequence[Point], class_: str) -> str:
    """A line through points of data."""
    path = 'L'.join(f'{self.x(x):.1f} {self.y(y):.1f}' for x, y in points)
    return element('path', d=f'M{path}', class_=class_)

  def band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], c: str) -> str:
    """The area between two curves over the same x."""
    there = list(zip(xs, lows, strict=True))
    back = list(zip(xs, highs, strict=True))[::-1]
    path = 'L'.join(f'{self.x(x):.1f} {self.y(y):.1f}' for x, y in there + back)
    return element('path', d=f'M{path}Z', class_=c)

  def cross(self, x: Sequence[float], y: Sequence[float], class_: str) -> str:
    """Intervals of a point: `(mean, low, high)` along either axis, cut at the edge of the plot."""
    left = max(x[1], self.x_range[0])
    return self.line([(left, y[0]), (x[2], y[0])], class_) + self.line(
      [(x[0], y[1]), (x[0], y[2])], class_
    )

  def drawing(self, title: str, content: str, class_: str = '') -> str:
    """The `svg` element, which scales to its container."""
    return element(
      'svg',
      content,
      aria_label=title,
      viewBox=f'0 0 {self.width:g} {self.height:g}',
      role='img',
      class_=f'chart {class_}'.strip(),
    )


def marker(shape: str, x: float, y: float, size: float, class_: str, tooltip: str = '') -> str:
  """A mark at a pixel; its area is about the same whatever its shape."""
  title = element('title', html.escape(tooltip)) if tooltip else ''
  if shape == 'circle':
    return element('circle', title, cx=x, cy=y, r=size, class_=class_)
  corners, turn, radius = {
    'square': (4, 0.125, 1.25),
    'triangle': (3, 0.0, 1.4),
    'diamond': (4, 0.0, 1.3),
    'pentagon': (5, 0.0, 1.15),
    'star': (10, 0.0, 1.6),
  }[shape]
  points = []
  for corner in range(corners):
    angle = 2 * math.pi * (corner / corners + turn) - math.pi / 2
    length = size * radius * (0.45 if shape == 'star' and corner % 2 else 1.0)
    points.append(f'{x + length * math.cos(angle):.1f},{y + length * math.sin(angle):.1f}')
  return element('polygon', title, points=' '.join(points), class_=class_)
