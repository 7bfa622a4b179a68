"""report.html is one safe, well-formed file that needs nothing else."""

import re
from html.parser import HTMLParser

import pytest

from experiments.reporting import page

VOID = {'meta'}


class Reader(HTMLParser):
  """Collects tags, attributes and text, and checks that every tag is closed in its turn."""

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope='module')
def html(summary):
  return page.render({**summary, 'findings': ['<script>evil()</script> is wrong']})


@pytest.fixture(scope='module')
def reader(html):
  reader = Reader()
  reader.feed(html)
  assert reader.open == []
  return reader


def test_every_text_is_escaped(reader):
  assert 'script' not in reader.tags and 'b' not in reader.tags
  text = ''.join(reader.text)
  assert '<script>evil()</script> is wrong' in text
  assert '<script>alert("x")</script> & `a|b` **c**' in text
  assert 'the same <b>SFT</b> parameters' in text


def test_nothing_is_loaded_from_elsewhere(html, reader):
  names = {name for name, _ in reader.attributes}
  assert not names & {'src', 'href', 'srcset', 'data', 'action'}
  assert not any(name.startswith('on') for name in names)
  assert not re.search(r'url\(|@import|https?:', html)


def test_the_page_fits_phones_and_both_colour_schemes(html):
  assert 'name="viewport" content="width=device-width' in html
  assert 'prefers-color-scheme: dark' in html
  assert 'class="chart wide"' in html and 'class="chart narrow"' in html


def test_every_class_has_a_style(html, reader):
  """A mark whose class the style sheet does not know would be drawn black on black."""
  style = html[html.index('<style>') : html.index('</style>')]
  unstyled = {'plain', 'wide'}
  for name, value in reader.attributes:
    for class_ in value.split() if name == 'class' else ():
      assert class_ in unstyled or re.search(rf'\.{class_}\b', style), class_


def test_warnings_are_counted_and_their_absence_is_said(summary, html):
  assert '<h2>One warning</h2>' in html and 'class="warnings"' in html
  fine = page.render({**summary, 'findings': []})
  assert 'No warnings.' in fine and 'class="warnings"' not in fine


def test_a_bare_summary_of_the_schema_is_rendered(summary):
  """Only what the contract demands: no study, no matched KL, no completions."""
  bare = {name: summary[name] for name in ('schema', 'rows', 'optimum', 'reward_model', 'findings')}
  reader = Reader()
  reader.feed(page.render(bare))
  assert reader.open == []
