"""Whatever models, annotators and authors of configs write, a report shows it as text."""

import re

import pytest

from experiments.reporting import markdown, page
from experiments.reporting.summary import Completion, Study, summarise
from tests.experiments.reporting.page_test import Reader

# Each would run or load something where one kind of text is not escaped.
HOSTILE = [
  '<script>evil()</script>',
  '</title></style></svg></pre><script>evil()</script>',
  '"><img src=x onerror=evil()>',
  "' onmouseover='evil()",
  '" onmouseover="evil()" x="',
  '<svg onload=evil()><!--',
  ']]><script>evil()</script>',
  '&lt;script&gt;evil()&lt;/script&gt;',
  '[x](javascript:evil()) ![x](https://evil.example/x.png)',
  '`<script>evil()</script>`\n```\n<script>evil()</script>',
  '| a | b |\n|---|---|\n<details><iframe src=//evil.example>',
  '\u202e<scr\0ipt>evil()</script>',
]


@pytest.fixture(params=HOSTILE)
def hostile(request):
  return request.param


@pytest.fixture
def planted(hostile, evaluation, optimum):
  """A study in which every text is the hostile one."""
  other = f'{hostile} two'
  rows = [evaluation('sft', 0, 10, gold=2.0)]
  for name in (hostile, other):
    for seed in (0, 1):
      for step in (10, 20):
        rows.append(evaluation(name, seed, step, gold=2 + step / 40, kl=0.02 * step, length=20.0))
  rows.append(evaluation(hostile, 2, 20, gold=9.0, kl=0.1))  # above the optimum: said in a finding
  study = Study(
    title=hostile,
    command=hostile,
    matched=[(hostile, hostile)],
    environment=[(hostile, hostile)],
    kl_budget=0.1,
    damage=[hostile],
    quarantined=1,
  )
  shown = [
    Completion(prompt=hostile, objective=hostile, response=hostile, gold_reward=1.0),
    Completion(prompt=other, objective=other, response=other, gold_reward=1.0),
  ]
  judge = {'accuracy': 0.8, 'bayes_accuracy': 0.82}
  summary = summarise(rows, optimum=optimum, reward_model=judge, study=study, completions=shown)
  assert any(hostile in finding for finding in summary['findings'])
  return summary


def test_a_page_has_the_tags_and_attributes_of_its_own_alone(planted, summary, hostile):
  """Those of a harmless study; the hostile text is there to be read, in charts too."""
  harmless, reader = Reader(), Reader()
  harmless.feed(page.render({**summary, 'findings': ['x']}))
  reader.feed(page.render(planted))
  assert reader.open == []
  assert set(reader.tags) <= set(harmless.tags)
  assert {name for name, _ in reader.attributes} <= {name for name, _ in harmless.attributes}
  shown = ''.join(reader.text)
  assert shown.count(hostile.replace('\0', '�')) > 20 or shown.count(hostile) > 20


def test_markdown_has_no_tag_and_no_link(planted):
  """Outside its one code block."""
  rendered = markdown.render(planted)
  start = rendered.index('The study and this report are made again by\n\n')
  fence = re.match(r'`{3,}', rendered[start:].split('\n\n', 1)[1])
  assert fence is not None
  opening = rendered.index(fence.group(), start)
  closing = rendered.index(f'\n{fence.group()}\n', opening)
  outside = rendered[:opening] + rendered[closing + len(fence.group()) + 1 :]
  assert '<' not in outside and not re.search(r'&(?!amp;|lt;|gt;)', outside)
  assert not re.search(r'(?<!\\)\](?=\()|(?<!\\)`', outside)
