"""docs/objectives.md: its generated parts are current, and what it names exists and works."""

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from docs import fill
from rlhf_jax.config import ExperimentConfig, load_config
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.objectives import OBJECTIVES, Actors
from rlhf_jax.recipes.rewards import load_function
from tests.objectives import base_test, cases, properties_test, tabular
from tests.objectives.references import pairs

PAGE = fill.PAGE.read_text()
SECTIONS = fill.sections(PAGE)
FENCED = re.compile(r'^```(\w+)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
SPAN = re.compile(r'`([^`\n]+)`')
CONFIG = re.compile(r'configs/\w+\.py(?::\w+)?')
SETTING = re.compile(
  r'((?:objective|data|policy|reward_model|rollout|generation)(?:\.\w+|\[\d+\])+)=(\S+)'
)
CODE = [text for kind, text in FENCED.findall(PAGE) if kind == 'python']


def options() -> list[tuple[str, str]]:
  """(section, code span) of all settings; those of one span belong together."""
  found = []
  for section, text in SECTIONS.items():
    spans = SPAN.findall(FENCED.sub('', text))
    found += [(section, span) for span in spans if SETTING.match(span)]
  return found


def base_of(section: str) -> Any:
  """A config with the defaults of the section's objective; of other sections the first it names."""
  if section in OBJECTIVES:
    config = load_config(fill.config_of(section))
    return dataclasses.replace(config, objective=OBJECTIVES[section].config())
  named = CONFIG.search(SECTIONS[section])
  assert named, f'{section}: name a config that its options are tried on'
  return load_config(named[0])


def put(config: Any, path: list[str], value: Any) -> Any:
  """The config with another value at a path; a number in it is a place in a tuple."""
  if not path:
    return value
  if isinstance(config, tuple):
    items = list(config)
    items[int(path[0])] = put(items[int(path[0])], path[1:], value)
    return tuple(items)
  assert path[0] in {field.name for field in dataclasses.fields(config)}, path[0]
  return dataclasses.replace(config, **{path[0]: put(getattr(config, path[0]), path[1:], value)})


def load(code: str, folder: Path) -> ModuleType:
  """A module with this code."""
  file = folder / 'example.py'
  file.write_text(code)
  spec = importlib.util.spec_from_file_location('example', file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
  """Configs are named from the root of the checkout."""
  monkeypatch.chdir(fill.ROOT)


def test_the_generated_parts_are_current() -> None:
  """Else: `python -m docs.fill`."""
  assert fill.fill(PAGE) == PAGE


def test_filling_restores_what_was_changed() -> None:
  """Values, and rows of which there are none any more."""
  spoiled = PAGE.replace('| `beta` | `0.1` |', '| `beta` | `7` |\n| `gone` | `0` |')
  assert spoiled != PAGE
  assert fill.fill(spoiled) == PAGE


def test_comments_are_found() -> None:
  """Of a field of its own, of one that shares them, and of one within another config."""
  comments = {field.name: field for field in fill.fields_of(OBJECTIVES['reinforce_pp'].config())}
  assert comments['samples'].comment == 'Responses to each prompt.'
  assert comments['minibatches'].comment == ''
  assert comments['kl.coefficient'].default == '0.01', 'the default there, not that of the class'
  table = fill.field_table('reinforce_pp')
  assert '| `epochs`, `minibatches` | `1`, `1` | Passes over' in table
  assert '`kl.horizon`, `' not in table, 'a field of the objective beside one of the penalty'


@pytest.mark.parametrize('name', OBJECTIVES)
def test_every_objective_has_a_section(name: str) -> None:
  """With its source, its needs, its fields, whom it reproduces, and pitfalls."""
  section = SECTIONS[name]
  assert fill.PAPER.search(section)
  for part in (f'generated: facts {name} ', f'generated: fields {name} ', '**As in other code'):
    assert part in section, part
  pitfalls = section.partition('**Pitfalls.**')[2]
  assert len(re.findall(r'^- ', pitfalls, re.MULTILINE)) >= 2
  assert f'| [{name}](#{name}) |' in PAGE


def test_sections_stand_for_objectives() -> None:
  """None is left of an objective that is no more."""
  headings = re.findall(r'^### (.+)$', PAGE, re.MULTILINE)
  assert sorted(headings) == sorted(OBJECTIVES)


@pytest.mark.parametrize(
  'name', sorted({*CONFIG.findall(FENCED.sub('', PAGE))} - {'configs/slic.py'})
)
def test_configs_that_are_named_work(name: str) -> None:
  """They are there and can be built; those that need no files of data are valid."""
  config = load_config(name)
  if isinstance(config, ExperimentConfig) and config.data.source != 'jsonl':
    config.validate()


def test_the_command_lines_name_configs() -> None:
  """Of programs in blocks of text."""
  found = re.findall(r'--config=(\S+)', PAGE)
  assert found
  for name in found:
    load_config(name).validate()


@pytest.mark.parametrize(('section', 'span'), options())
def test_options_that_are_named_are_valid(section: str, span: str) -> None:
  """Fields that exist, with values that the whole config accepts."""
  settings = [SETTING.fullmatch(word) for word in span.split(' ')]
  config = base_of(section)
  for setting in settings:
    assert setting, f'{section}: {span}: expected FIELD=VALUE, apart by single spaces'
    path = re.findall(r'\w+', setting[1])
    config = put(config, path, ast.literal_eval(setting[2]))
  config.validate()


def test_targets_of_adapters_can_be_typed_as_shown() -> None:
  """The default as it is, and an example of several."""
  page = (fill.PAGE.parent / 'adapters.md').read_text()
  row = re.search(r'^\| `targets` \| `(.*?)` .*targets="(.*?)"`', page, re.MULTILINE)
  assert row is not None
  default, several = map(ast.literal_eval, row.groups())
  assert default == AdapterConfig().targets
  AdapterConfig(method='lora', targets=several).validate('adapter')


def test_the_example_of_rewards_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The functions score, and the config that names them is valid."""
  functions, config = (code for code in CODE if 'rewards.py' in code)
  (tmp_path / 'rewards.py').write_text(functions)
  monkeypatch.chdir(tmp_path)
  answer, brevity = (load_function(f'rewards.py:{name}') for name in ('answer', 'brevity'))
  texts = (['2 + 3 ='] * 3, ['It is 5', '2 and 3 make 6', 'no'])
  np.testing.assert_array_equal(answer(*texts), [1, 0, 0])
  np.testing.assert_array_equal(brevity(*texts), [0, 0, 0])
  assert brevity(['2 + 3 ='], ['so ' * 43]) == [-3]
  found = load(config, tmp_path).get_config()
  found.validate()
  for source in found.rollout.sources():
    load_function(source)


@pytest.fixture
def example(tmp_path: Path) -> Any:
  """The row of the table that the page's example is."""
  (code,) = (code for code in CODE if 'OBJECTIVE' in code)
  return load(code, tmp_path).OBJECTIVE


def test_the_example_of_an_objective_works(example: Any) -> None:
  """Its config validates, its loss is the equation."""
  row = example
  config = row.config(delta=2.0, nll_coefficient=0.5)
  config.validate('objective')
  logprobs = np.array([[[-1.0, -2.0], [-1.5, -9.0]], [[-1.0, -1.0], [-4.0, -4.0]]], np.float32)
  mask = np.array([[[1, 1], [1, 0]], [[1, 1], [1, 1]]], bool)
  actors = Actors(policy=tabular.DIRECT.policy)
  leaves = {name: logprobs for name in ('logprobs', 'entropy', 'values')}
  mean, _ = row.loss(config, actors, leaves, pairs({'mask': mask}))
  # Totals -3, -1.5 and -2, -8.
  expected = ((2.0 + 3.0 - 1.5) + 0.5 * 3.0 + 0.0 + 0.5 * 2.0) / 2
  np.testing.assert_allclose(mean.value(), expected, rtol=1e-6)


# What is asked of a case of comparisons, with the arguments of one call.
PROPERTIES: dict[str, tuple[Any, ...]] = {
  'test_cases_are_valid_configs': (),
  'test_masked_contents_do_not_matter': (np.nan, 0),
  'test_masked_outputs_do_not_matter_and_have_no_gradient': (np.inf,),
  'test_more_padding_changes_nothing': (),
  'test_swapping_labels_mirrors_the_loss': (),
  'test_swapping_negates_the_predicted_difference': (),
  'test_splitting_rows_changes_nothing': (),
  'test_losses_and_metrics_are_float32': (),
  'test_gradients_stay_finite_at_extreme_log_ratios': (1e3,),
  'test_reference_log_probs_are_needed_exactly_where_declared': (),
}


def test_the_example_of_an_objective_has_all_properties(
  example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In the table and among the cases, as the page says, it passes what is asked of all of them."""
  monkeypatch.setitem(OBJECTIVES, example.name, example)
  monkeypatch.setitem(cases.CASES, example.name, example.config())
  base_test.test_rows_of_the_table_are_whole()
  base_test.test_a_config_selects_its_objective_by_type()
  properties_test.test_every_objective_has_a_case()
  tests = inspect.getmembers(properties_test, inspect.isfunction)
  asked = {name for name, test in tests if 'case' in inspect.signature(test).parameters}
  asked = {name for name in asked if name.startswith('test_')}
  assert asked - {'test_the_order_in_which_a_ranking_is_listed_does_not_matter'} == set(PROPERTIES)
  for name, arguments in PROPERTIES.items():
    getattr(properties_test, name)(example.name, *arguments)


def test_the_results_on_human_comparisons_are_of_the_configs() -> None:
  """As many steps as they have, with and without what a row says it changes."""
  page = (fill.PAGE.parent / 'hh_harmless.md').read_text()
  rows = re.findall(r'^\| (SFT|reward model|DPO|CPL-KL|PPO)\b.*?\| (\d+) \|', page, re.MULTILINE)
  assert len(rows) == 7
  for stage, steps in rows:
    name = {'CPL-KL': 'cpl'}.get(stage, stage.lower().replace(' ', '_'))
    assert load_config(f'configs/hh_harmless_{name}.py').steps == int(steps), stage
