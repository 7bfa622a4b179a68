"""The order of the layers, and what must stay unimported, read from the sources themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A unit imports from units of earlier layers and from itself, never from another unit of its own
# layer. A unit is a package of rlhf_jax or, in the root layer, the modules that wire it together.
LAYERS: tuple[tuple[str, ...], ...] = (
  ('common',),
  ('ops', 'sharding', 'feedback'),
  ('data',),
  ('models',),
  ('generation', 'objectives'),
  ('rollout', 'training', 'evaluation'),
  ('root',),
  ('experiments',),
)
ROOT_UNIT = (
  'config',
  'config_parts',
  'config_values',
  'hf_folder',
  'origins',
  'planning',
  'provenance',
  'reading',
  'recipes',
  'runs',
  'stages',
  'study',
)
LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}

# Slow to import, heavy, optional, or missing on some machines: only functions that need them import
# them, so that what does not need them works without.
LAZY = (
  'datasets',
  'grain',
  'matplotlib',
  'ml_collections',
  'ray',
  'scipy',
  'submitit',
  'tensorboardX',
  'tensorflow',
  'tensorflow_datasets',
  'tokamax',
  'torch',
  'transformers',
  'wandb',
)


def unit_of(module: str) -> str | None:
  """The unit that a module's dotted name belongs to; None for modules that are not ours."""
  first, _, rest = module.partition('.')
  if first == 'experiments':
    return first
  if first != 'rlhf_jax' or not rest:
    return None
  name = rest.partition('.')[0]
  return 'root' if name in ROOT_UNIT else name


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
  """(line, dotted name) of all that a module imports, in functions too.

  Of `from a import b` both `a` and `a.b` are yielded, since `b` may be a module.
  """
  package = module.split('.') if is_package else module.split('.')[:-1]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      source = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
      yield node.lineno, source
      for alias in node.names:
        yield node.lineno, f'{source}.{alias.name}'


def sources(*folders: str) -> Iterator[tuple[Path, str, bool, ast.AST]]:
  """(path in the project, dotted module, is it a package, syntax tree) of each source file."""
  for folder in folders:
    for file in sorted((ROOT / folder).rglob('*.py')):
      path = file.relative_to(ROOT)
      is_package = path.name == '__init__.py'
      parts = path.parent.parts if is_package else path.with_suffix('').parts
      yield path, '.'.join(parts), is_package, ast.parse(file.read_text('utf-8'), str(path))


def violations(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
  """(line, what is wrong) of each import in a module that the order of the layers forbids."""
  unit = unit_of(module)
  found: dict[tuple[int, str], str] = {}  # one message for all names of an import
  for line, imported in imported_modules(tree, module, is_package):
    first = imported.partition('.')[0]
    if first in ('configs', 'tests', 'benchmarks'):
      found.setdefault((line, first), f'{imported} is not for the library or the programs')
    other = unit_of(imported)
    if unit == other or unit not in LAYER_OF or other not in LAYER_OF:
      continue
    if LAYER_OF[other] >= LAYER_OF[unit]:
      layers = f'layer {LAYER_OF[unit] + 1} imports from layer {LAYER_OF[other] + 1}'
      found.setdefault((line, other), f'{unit} must not import {imported}: {layers}')
  return [(line, message) for (line, _), message in found.items()]


def test_every_package_has_a_layer() -> None:
  """A new package or module at the root of rlhf_jax is first given its place in LAYERS."""
  modules = [module for _, module, _, _ in sources('rlhf_jax')]
  unknown = sorted({unit for m in modules if (unit := unit_of(m)) and unit not in LAYER_OF})
  assert not unknown, f'not in LAYERS or ROOT_UNIT of {Path(__file__).name}: {unknown}'


def test_imports_follow_the_layers() -> None:
  """A module imports only from layers above its own in the design's list."""
  found = [
    f'{path}:{line}: {what}'
    for path, module, is_package, tree in sources('rlhf_jax', 'experiments')
    for line, what in violations(tree, module, is_package)
  ]
  assert not found, '\n'.join(found)


@pytest.mark.parametrize(
  ('module', 'code', 'allowed'),
  [
    ('rlhf_jax.ops.kl', 'from rlhf_jax.common import masked', True),
    ('rlhf_jax.ops.kl', 'from rlhf_jax.ops import logprobs', True),
    ('rlhf_jax.recipes', 'import rlhf_jax.config', True),
    ('experiments.compare', 'from experiments import report', True),
    ('rlhf_jax.common.masked', 'import rlhf_jax.ops.kl', False),
    ('rlhf_jax.data.sources', 'from rlhf_jax import feedback', True),
    ('rlhf_jax.data.sources', 'from ..feedback.records import Comparison', True),
    ('rlhf_jax.training.loop', 'def f():\n  from rlhf_jax.rollout import rollout', False),
    ('rlhf_jax.stages.run', 'import experiments.report', False),
    ('rlhf_jax.stages.run', 'from configs import quickstart', False),
  ],
)
def test_the_layer_check_itself(module: str, code: str, allowed: bool) -> None:
  """Absolute, relative, `from package import module` and imports in functions are all seen."""
  assert (not violations(ast.parse(code), module, is_package=False)) == allowed


def test_objectives_import_no_model() -> None:
  """Objectives see log-probabilities, masks and rewards, so that any policy can train by them."""
  found = [
    f'{path}:{line}: {name}'
    for path, module, is_package, tree in sources('rlhf_jax/objectives')
    for line, name in imported_modules(tree, module, is_package)
    if unit_of(name) == 'models'
  ]
  assert not found, '\n'.join(found)


def test_flax_nnx_is_never_imported() -> None:
  """`import flax.nnx` fails on some pairs of jax and flax that the project supports."""
  found = []
  for path, module, is_package, tree in sources('rlhf_jax', 'experiments', 'configs', 'benchmarks'):
    for line, name in imported_modules(tree, module, is_package):
      # What runs in a peer's environment has the peer's flax.
      if name.startswith('flax.nnx') and not str(path).startswith('benchmarks/peers/'):
        found.append(f'{path}:{line}: {name}')
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and ast.unparse(node).startswith('flax.nnx'):
        found.append(f'{path}:{node.lineno}: {ast.unparse(node)}')
  assert not found, '\n'.join(found)


def test_heavy_libraries_are_imported_lazily() -> None:
  """Every module of rlhf_jax can be imported where the libraries of LAZY are missing."""
  modules = [module for _, module, _, _ in sources('rlhf_jax')]
  code = f"""
import importlib, sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {LAZY!r}:
      raise ModuleNotFoundError(f'{{name}} is imported when the library is', name=name)

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
  importlib.import_module(module)
"""
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
