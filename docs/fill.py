"""Rewrites the generated parts of docs/objectives.md: `python -m docs.fill`.

A part lies between `<!-- generated: KIND NAME -->` and `<!-- end -->`. What it holds is read from
the table of objectives, from the config classes and the comments in them, and from the configs.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.config import ExperimentConfig, RewardModelInitConfig, load_config
from rlhf_jax.data.lqr import LQRConfig
from rlhf_jax.feedback.convert import CONVERTERS
from rlhf_jax.models.gaussian import GaussianPolicyConfig
from rlhf_jax.objectives import OBJECTIVES, Objective, objective_of
from rlhf_jax.objectives.base import always, never
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'objectives.md'

PART = re.compile(r'<!-- generated: (\w+)(?: (\w+))? -->\n.*?<!-- end -->', re.DOTALL)
# The first link of a section's source is the paper of the table at the top.
PAPER = re.compile(r'\*\*Source\.\*\*\s+(\[[^\]]+\]\([^)]+\))')

# Configs whose fields the page lists, by the name in its markers.
CONFIGS: dict[str, type] = {
  **{name: row.config for name, row in OBJECTIVES.items()},
  'reward': RewardConfig,
  'rollout': RolloutConfig,
  'reward_model_init': RewardModelInitConfig,
  'lqr': LQRConfig,
  'gaussian_policy': GaussianPolicyConfig,
}


class Field(NamedTuple):
  """A field of a config: its path, its default as source, and the comment above it."""

  name: str
  default: str
  comment: str

  @property
  def parent(self) -> str:
    """The path of the config it is in."""
    return self.name.rpartition('.')[0]


def comments_of(kind: type) -> dict[str, str]:
  """The comment lines right above each field of a class, joined; '' where there are none."""
  lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
  tree = ast.parse('\n'.join(lines)).body[0]
  assert isinstance(tree, ast.ClassDef)
  comments = {}
  for node in tree.body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      above = (line.strip() for line in reversed(lines[: node.lineno - 1]))
      block = list(itertools.takewhile(lambda line: line.startswith('#'), above))
      comments[node.target.id] = ' '.join(line.lstrip('# ') for line in reversed(block))
  return comments


def fields_of(config: Any, prefix: str = '') -> list[Field]:
  """The fields of a config and of those within it, whose defaults are those it gives them."""
  comments: dict[str, str] = {}
  for kind in reversed(type(config).__mro__):
    if dataclasses.is_dataclass(kind):
      comments |= comments_of(kind)
  rows = []
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    rows.append(Field(name, source_of(value), comments[field.name]))
    if dataclasses.is_dataclass(value):
      rows += fields_of(value, f'{name}.')
  return rows


def source_of(value: Any) -> str:
  """A default as one would write it; of a config its name, since its fields have their own rows."""
  if dataclasses.is_dataclass(value):
    return f'{type(value).__name__}()'
  if isinstance(value, tuple):
    return f'({", ".join(map(source_of, value))}{"," if len(value) == 1 else ""})'
  return repr(value)


def field_table(name: str) -> str:
  """Fields, defaults and comments; fields that share a comment share a row."""
  rows: list[list[Field]] = []
  for field in fields_of(CONFIGS[name]()):
    # Between a field and the one whose comment it shares there may be those of a config within.
    siblings = (row for row in reversed(rows) if row[0].parent == field.parent)
    if field.comment or (row := next(siblings, None)) is None:
      rows.append([field])
    else:
      row.append(field)
  if not rows:
    return 'No settings of its own.'
  lines = ['| field | default | meaning, and where the default is from |', '|---|---|---|']
  for group in rows:
    names, defaults = (', '.join(f'`{field[place]}`' for field in group) for place in (0, 1))
    lines.append(f'| {names} | {defaults} | {cell(group[0].comment)} |')
  return '\n'.join(lines)


def cell(text: str) -> str:
  """Text that a cell of a table shows as it is."""
  return text.replace('|', '\\|').replace('<', '&lt;')


@functools.cache
def configs_of() -> dict[str, list[str]]:
  """The files in configs/ of stages, by the name of their objective."""
  found: dict[str, list[str]] = {name: [] for name in OBJECTIVES}
  for file in sorted((ROOT / 'configs').glob('*.py')):
    if 'def get_config' in file.read_text():
      config = load_config(str(file))
      if isinstance(config, ExperimentConfig):
        found[objective_of(config.objective).name].append(f'configs/{file.name}')
  return found


def config_of(name: str) -> str:
  """The config that shows an objective: that of its name, or the first there is."""
  own = f'configs/{name}.py'
  return own if own in configs_of()[name] else configs_of()[name][0]


def reference_of(row: Objective) -> str:
  """Whether it needs a frozen reference: in every variant, in none, or in some."""
  if row.reference is always:
    return 'yes'
  return 'no' if row.reference is never else 'in some variants'


def value_of(row: Objective) -> str:
  """Which function of states it needs or learns."""
  demands = row.demands(row.config())
  if demands.value is not None:
    return 'yes'
  if demands.q is not None:
    return 'Q and V'
  if row.curate is not None and 'baselines()' in inspect.getsource(row.curate):
    return 'of the reference, fitted'
  return 'no'


def reward_of(row: Objective) -> str:
  """Whether responses, or the steps that a policy learns from, are scored by a reward."""
  return 'yes' if row.paid else 'no'


def facts(name: str) -> str:
  """What an objective eats and needs, and which configs there are."""
  row = OBJECTIVES[name]
  ways = [
    f'`{key}` (from {way.source})' for key, way in CONVERTERS.items() if way.target == row.data
  ]
  made = f', as they are or with `data.convert`: {", ".join(ways)}' if ways else ''
  trains = 'a reward model' if row.trains == 'reward_model' else 'the policy'
  return '\n'.join(
    (
      f'- Eats `{row.data}` ([data.md](data.md)){made}.',
      f'- Trains {trains}. Reference: {reference_of(row)}. Reward: {reward_of(row)}. '
      f'Value function: {value_of(row)}.',
      f'- Configs: {", ".join(f"`{file}`" for file in configs_of()[name])}.',
    )
  )


def overview(page: str) -> str:
  """The table of all objectives, in the order of their sections."""
  head = ('objective', 'paper', 'eats', 'reference', 'reward', 'value function', 'config')
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  for name, section in sections(page).items():
    if name not in OBJECTIVES:
      continue
    row, paper = OBJECTIVES[name], PAPER.search(section)
    cells = (
      f'[{name}](#{name})',
      paper[1] if paper else '',
      row.data,
      reference_of(row),
      reward_of(row),
      value_of(row),
      f'`{config_of(name)}`',
    )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def sections(page: str) -> dict[str, str]:
  """The text of the page by its headings of the third level, or of the second."""
  parts = re.split(r'^###? (.+)$', page, flags=re.MULTILINE)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


def fill(page: str) -> str:
  """The page with every generated part made anew; raises KeyError for a name that is none."""

  def part(found: re.Match[str]) -> str:
    kind, name = found.groups()
    makers = {'objectives': lambda: overview(page), 'facts': lambda: facts(name)}
    text = makers.get(kind, lambda: field_table(name))()
    marker = found[0].splitlines()[0]
    return f'{marker}\n\n{text}\n\n<!-- end -->'

  return PART.sub(part, page)


if __name__ == '__main__':
  PAGE.write_text(fill(PAGE.read_text()))
