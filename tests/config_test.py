"""Configs: every one in configs/ works, every field is read, every mistake is named."""

import ast
import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.config import ExperimentConfig, InitConfig, load_config
from rlhf_jax.config_values import canonical_json, differences, from_dict, to_dict
from rlhf_jax.data.config import DataConfig
from rlhf_jax.objectives import OBJECTIVES, ObjectiveConfig, objective_of
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.rollout.config import RewardConfig, RolloutConfig
from rlhf_jax.study import StudyConfig
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(
  path.stem for path in (ROOT / 'configs').glob('*.py') if 'def get_config' in path.read_text()
)


def stages_of(config: Any) -> list[ExperimentConfig]:
  """A stage itself, or all stages of a study."""
  if isinstance(config, StudyConfig):
    return [config.sft, config.reward_model, *config.objectives.values()]
  return [config]


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_is_valid_and_survives_json(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """Built, validated, written as JSON and read back equal; the stages it starts from exist."""
  monkeypatch.chdir(ROOT)
  config = load_config(f'configs/{name}.py')
  config.validate()
  for stage in stages_of(config):
    stage.validate()
    again = from_dict(ExperimentConfig, json.loads(canonical_json(to_dict(stage))))
    assert again == stage and type(again.objective) is type(stage.objective)
    for role in ('policy', 'reward_model'):
      if (init := getattr(stage, role).init) is not None:
        assert isinstance(load_config(init), ExperimentConfig)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_there_is_a_config_of_every_objective(name: str) -> None:
  """Of its name, but IQL's, which is for control only."""
  config = load_config(str(ROOT / 'configs' / f'{"lqr_piql" if name == "iql" else name}.py'))
  assert type(config.objective) is OBJECTIVES[name].config


def test_there_is_a_tiny_stage_of_every_objective() -> None:
  """What surrounds the mathematics is tested on them; IQL, which is for control, elsewhere."""
  tested = {objective_of(make()).name for make in tiny.OBJECTIVES.values()}
  assert tested == set(OBJECTIVES) - {'iql'}


@pytest.mark.parametrize('case', tiny.OBJECTIVES)
def test_a_config_says_its_objective_in_json(case: str) -> None:
  """Classes that share fields are told apart by 'kind'; tuples and None come back."""
  config = tiny.make_config(case, 'somewhere')
  config.generation.stop_tokens = (3, 4)
  values = json.loads(canonical_json(to_dict(config)))
  assert OBJECTIVES[values['objective']['kind']].config is type(config.objective)
  assert from_dict(ExperimentConfig, values) == config


def options_of(hint: Any) -> tuple[Any, ...]:
  """What an annotation allows: members of a union, items of a tuple, any objective's config."""
  if hint is ObjectiveConfig:
    return tuple(row.config for row in OBJECTIVES.values())
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is tuple:
    return tuple(option for part in typing.get_args(hint) for option in options_of(part))
  return (hint,)


def config_classes(kind: type = ExperimentConfig) -> Iterator[type]:
  """All config classes, outermost first."""
  yield kind
  for hint in typing.get_type_hints(kind).values():
    for option in options_of(hint):
      if dataclasses.is_dataclass(option):
        yield from config_classes(typing.cast(type, option))


CLASSES = {kind.__name__: kind for kind in (*config_classes(), StudyConfig)}
FIELDS = {name: set(typing.get_type_hints(kind)) for name, kind in CLASSES.items()}
# Which classes lie in a field of that name, e.g. 'optimizer' -> OptimizerConfig.
HOLDERS: dict[str, set[str]] = {}
for holder in CLASSES.values():
  for field_name, field_hint in typing.get_type_hints(holder).items():
    for part in options_of(field_hint):
      if dataclasses.is_dataclass(part):
        HOLDERS.setdefault(field_name, set()).add(typing.cast(type, part).__name__)


class Reads(ast.NodeVisitor):
  """Collects (config class, field) reads of a module; what is only validated does not count.

  The owner of `x.field` is known from an annotation of `x`, from `isinstance(x, Class)`, from
  `x = something.holder`, `for x in something.holder`, or from `something.holder.field`; else a name
  counts if it is one class's. What is read of `something.objective` is read of any objective.
  """

  def __init__(self) -> None:
    self.found: set[tuple[str, str]] = set()
    self.scopes: list[dict[str, set[str]]] = [{}]

  def _function(self, node: ast.FunctionDef) -> None:
    if node.name.lstrip('_').startswith(('validate', 'check')) and node.name != 'check_rows':
      return
    scope: dict[str, set[str]] = {}
    for argument in (*node.args.args, *node.args.kwonlyargs):
      if argument.annotation is not None:
        named = {x.id for x in ast.walk(argument.annotation) if isinstance(x, ast.Name)}
        # What takes a config takes those that are made from its class too.
        fit = tuple(CLASSES[name] for name in named & CLASSES.keys())
        if fit:
          scope[argument.arg] = {name for name, kind in CLASSES.items() if issubclass(kind, fit)}
    for inner in ast.walk(node):
      match inner:
        case (
          ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value)
          | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
          | ast.For(target=ast.Name(id=name), iter=value)
          | ast.comprehension(target=ast.Name(id=name), iter=value)
        ):
          owners = self._owners(value, scope)
          if owners is not None:
            scope[name] = owners
    for inner in ast.walk(node):
      if (
        isinstance(inner, ast.Assert)
        and isinstance(inner.test, ast.Call)
        and getattr(inner.test.func, 'id', '') == 'isinstance'
        and isinstance(inner.test.args[0], ast.Name)
      ):
        named = {x.id for x in ast.walk(inner.test.args[1]) if isinstance(x, ast.Name)}
        scope[inner.test.args[0].id] = named
    self.scopes.append(scope)
    self.generic_visit(node)
    self.scopes.pop()

  visit_FunctionDef = _function  # noqa: N815

  def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802
    self.scopes.append({'self': {node.name}})
    self.generic_visit(node)
    self.scopes.pop()

  def _owners(self, value: ast.expr, scope: dict[str, set[str]] | None = None) -> set[str] | None:
    if isinstance(value, ast.Attribute):
      return HOLDERS.get(value.attr)
    if isinstance(value, ast.Name):
      for known in (*([scope] if scope else []), *reversed(self.scopes)):
        if value.id in known:
          return known[value.id]
    return None

  def _read(self, owner: ast.expr, name: str) -> None:
    owners = self._owners(owner)
    if owners is None:
      owners = {kind for kind, names in FIELDS.items() if name in names}
      owners = owners if len(owners) == 1 else set()
    self.found |= {(kind, name) for kind in owners}

  def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
    if isinstance(node.ctx, ast.Load):
      self._read(node.value, node.attr)
    self.generic_visit(node)

  def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
    if getattr(node.func, 'id', '') == 'getattr':
      owner, name = node.args[:2]
      if isinstance(name, ast.Constant):
        self._read(owner, str(name.value))
      else:  # a loop over the names of a config that is known
        for kind in (self._owners(owner) or set()) & CLASSES.keys():
          self.found |= {(kind, field) for field in FIELDS[kind]}
    self.generic_visit(node)


def test_every_field_is_read() -> None:
  """A field that nothing reads, apart from its own validation, is a promise that is not kept."""
  reads = Reads()
  for folder in ('rlhf_jax', 'experiments'):
    for path in (ROOT / folder).rglob('*.py'):
      reads.visit(ast.parse(path.read_text(encoding='utf-8')))
  unread = [
    f'{kind}.{name}'
    for kind, names in FIELDS.items()
    for name in sorted(names)
    if (kind, name) not in reads.found
  ]
  assert not unread
  assert len(CLASSES) > 15 and ('LogConfig', 'every') in reads.found
  assert ('LogConfig', 'batch_size') not in reads.found, 'the owners are not told apart'


def altered(case: str, changes: dict[str, Any]) -> ExperimentConfig:
  """A valid tiny config with fields, given by their dotted paths, set."""
  config = tiny.make_config(case, 'somewhere')
  config.validate()
  for path, value in changes.items():
    *holders, name = path.split('.')
    target: Any = config
    for one in holders:
      target = getattr(target, one)
    assert hasattr(target, name)
    setattr(target, name, value)
  return config


TASK = (RewardConfig(source='task'),)
BOTH = (RewardConfig(), *TASK)
SERVER = {'rollout.engine': 'http', 'rollout.server.url': 'http://127.0.0.1:1'}
JSONL = {'data.source': 'jsonl', 'data.path': 'x.jsonl'}


@pytest.mark.parametrize(
  ('case', 'changes', 'field', 'words'),
  [
    ('sft', {'name': ''}, 'name', 'letters'),
    ('sft', {'name': 'a/b'}, 'name', 'letters'),
    ('sft', {'steps': 0}, 'steps', '>= 1'),
    ('sft', {'batch_size': 0}, 'batch_size', '>= 1'),
    ('sft', {'seed': -1}, 'seed', 'from 0 to'),
    ('sft', {'accumulation': 3}, 'batch_size', 'accumulation 3'),
    ('ppo', {'accumulation': 8}, 'batch_size', 'objective.minibatches 2 x accumulation 8'),
    ('rloo', {'objective.minibatches': 3}, 'batch_size', 'rows (2 rows of each)'),
    ('best_of_n', {'batch_size': 1, 'accumulation': 4}, 'batch_size', '(2 rows of each)'),
    ('dpo', {'policy.init': None}, 'policy.init', 'dpo starts from'),
    ('cpl_kl', {'policy.init': None}, 'policy.init', 'cpl starts from'),
    ('ppo', {'policy.init': None}, 'policy.init', 'reference'),
    ('ppo', {'reward_model.init': None}, 'reward_model.init', "rewards[0].source='task'"),
    ('ppo', {**JSONL, 'rollout.rewards': TASK}, 'rollout.rewards[0].source', 'gold reward'),
    ('ppo', {'generation.temperature': 0.0}, 'generation.temperature', '> 0 for ppo'),
    ('ppo', {'objective.epochs': 0}, 'objective.epochs', '>= 1'),
    ('ppo', {'generation.top_k': 5}, 'generation', 'unfiltered policy'),
    (
      'ppo',
      {
        'rollout.old_logprobs': 'sampler',
        'generation.dtype': 'bfloat16',
        'model.dtype': 'float32',
      },
      'rollout.old_logprobs',
      "'trainer' with generation.dtype='bfloat16' and model.dtype='float32'",
    ),
    ('ppo', {'objective.score_placement': 'last_position'}, 'objective.score_placement', 'eos'),
    ('ppo', {'rollout.rewards': ()}, 'rollout.rewards', 'at least one'),
    (
      'ppo',
      {'rollout.missing_stop': 'replace', 'generation.stop_at_eos': False},
      'rollout.missing_stop',
      'where no response can stop',
    ),
    ('ppo', {'evaluation.seed': 2**32}, 'evaluation.seed', '2**32 - 1'),
    ('dpo', SERVER, 'rollout.engine', "'local' for dpo"),
    ('ilql', SERVER, 'rollout.engine', "'local' for ilql"),
    (
      'ppo',
      {
        **SERVER,
        'rollout.server.dialect': 'sglang',
        'generation.stop_at_eos': False,
        'generation.stop_tokens': (3,),
      },
      'generation.stop_at_eos',
      'True with stop_tokens',
    ),
    ('rloo', {'reward_model.init': None}, 'reward_model.init', 'a Python function'),
    ('rloo', {**JSONL, 'rollout.rewards': BOTH}, 'rollout.rewards[1].source', 'gold reward'),
    (
      'ppo',
      {
        'reward_model.init': None,
        'rollout.rewards': TASK,
        'objective.value_model': 'reward_model',
      },
      'objective.value_model',
      "'shared' or 'separate'",
    ),
    ('ppo', {'reward_model.aggregate': 'median'}, 'reward_model.aggregate', 'one of'),
    ('ppo', {'reward_model.aggregate': 'uncertainty'}, 'reward_model.aggregate', 'other members'),
    ('dpo', {'reward_model.ensemble': ('x',)}, 'reward_model.init', 'first member'),
    (
      'ppo',
      {'reward_model.ensemble': ('x',), 'reward_model.uncertainty_coefficient': -0.5},
      'reward_model.uncertainty_coefficient',
      '>= 0',
    ),
    (
      'ppo',
      {'reward_model.ensemble': ('x',), 'reward_model.uncertainty_coefficient': 0.5},
      'reward_model.uncertainty_coefficient',
      "with aggregate 'mean'",
    ),
    *(
      (case, {'objective.samples': 1}, 'objective.samples', '>= 2')
      for case in ('rloo', 'grpo', 'online_dpo', 'best_of_n')
    ),
    ('dpo', {'objective.beta': 0.0}, 'objective.beta', '> 0'),
    ('cpl', {'objective.lam': 1.5}, 'objective.lam', '(0, 1]'),
    ('dpo', {'policy.checkpoint': 'newest'}, 'policy.checkpoint', "'best'"),
    ('sft', {'evaluation.every': -1}, 'evaluation.every', '>= 0'),
    ('sft', {'evaluation.batch_size': 0}, 'evaluation.batch_size', '>= 1'),
    ('sft', {'log.every': 0}, 'log.every', '>= 1'),
    ('sft', {'data.response_length': 0}, 'data.response_length', '>= 1'),
    ('sft', {'data.prompt_length': 1}, 'data.prompt_length', '<bos>'),
    ('sft', {'data.source': 'jsonl'}, 'data.path', 'a file'),
    ('sft', {'model.heads': 3}, 'model.heads', 'divisor'),
    ('sft', {'optimizer.learning_rate': 0.0}, 'optimizer.learning_rate', '> 0'),
    ('sft', {'mesh.fsdp': 0}, 'mesh.fsdp', 'positive'),
    ('sft', {'steps': 'ten'}, 'steps', 'int, not str'),
    ('sft', {'steps': True}, 'steps', 'int, not bool'),
    ('sft', {'optimizer.learning_rate': '1e-3'}, 'optimizer.learning_rate', 'float, not str'),
    ('sft', {'log.tensorboard': 1}, 'log.tensorboard', 'bool, not int'),
    ('sft', {'data.path': 3}, 'data.path', 'str or NoneType, not int'),
    ('sft', {'generation.stop_tokens': [1]}, 'generation.stop_tokens', 'tuple[int, ...], not list'),
    ('sft', {'generation.stop_tokens': ('a',)}, 'generation.stop_tokens', 'tuple[int, ...]'),
    ('sft', {'data': None}, 'data', 'DataConfig, not NoneType'),
    ('sft', {'objective': DataConfig()}, 'objective', 'SFTConfig or WeightedBCConfig'),
    ('dpo', {'objective.beta': float('nan')}, 'objective.beta', 'finite numbers'),
    ('kto', {'batch_size': 1}, 'batch_size', 'at least 2'),
    (
      'reinforce',
      {'batch_size': 1, 'objective.baseline': 'batch'},
      'batch_size',
      'at least 2',
    ),
  ],
)
def test_what_cannot_work_is_named(
  case: str, changes: dict[str, Any], field: str, words: str
) -> None:
  """The field as it is written on the command line, its value, and what was expected."""
  config = altered(case, changes)
  with pytest.raises(ConfigError) as caught:
    config.validate()
  assert caught.value.field == field
  assert str(caught.value).startswith(f'--config.{field}=') and words in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
  """An int where a float is meant is no mistake."""
  altered('ppo', {'objective.clip': 1, 'optimizer.learning_rate': 1, 'data.held_out': 3}).validate()


def test_a_sampler_in_the_trainers_type_may_say_the_log_probs() -> None:
  half = {'generation.dtype': 'bfloat16', 'rollout.old_logprobs': 'sampler'}
  altered('ppo', {**half, 'model.dtype': 'bfloat16'}).validate()


def test_objectives_without_a_reference_need_no_start() -> None:
  for objective in (SFTConfig(), CPLConfig()):
    ExperimentConfig(name='x', objective=objective).validate()
  with pytest.raises(ConfigError, match='policy.init'):
    ExperimentConfig(name='x', objective=DPOConfig()).validate()
  ExperimentConfig(
    name='x',
    objective=PPOConfig(),
    policy=InitConfig(init='a'),
    rollout=RolloutConfig(rewards=TASK),
  ).validate()


def test_the_stages_that_one_starts_from_by_role() -> None:
  """Members of an ensemble are numbered, and read the reward model's checkpoint, in their order."""
  config = altered(
    'ppo', {'policy.checkpoint': 'best', 'reward_model.ensemble': tuple('abcdefghijk')}
  )
  inits = config.inits()
  members = [f'reward_model_{number}' for number in range(1, 12)]
  assert list(inits) == ['policy', 'reward_model', *members]
  assert [inits[name].init for name in members] == list('abcdefghijk')
  assert inits['policy'].checkpoint == 'best' and inits['reward_model_3'].checkpoint == 'final'
  shuffled = {role: f'runs/{init}' for role, (init, _) in sorted(inits.items())}
  moved = config.with_inits(shuffled)
  assert {role: init for role, (init, _) in moved.inits().items()} == shuffled
  assert list(moved.inits()) == list(inits)
  assert moved.policy.checkpoint == 'best' and moved.objective == config.objective
  alone = config.with_inits({})
  assert not alone.inits() and alone.reward_model.ensemble == ()


def test_unknown_fields_get_a_suggestion() -> None:
  values = to_dict(tiny.make_config('dpo', 'somewhere'))
  values['objective']['betta'] = 0.1
  with pytest.raises(UserError, match="DPOConfig has no field 'betta': did you mean 'beta'"):
    from_dict(ExperimentConfig, values)


def test_differences_are_dotted_paths() -> None:
  first = to_dict(altered('dpo', {}))
  second = to_dict(altered('dpo', {'objective.beta': 0.3, 'data.reviews.labels.flip_rate': 0.1}))
  assert differences(first, first) == []
  assert differences(first, second) == [
    'data.reviews.labels.flip_rate: 0.0 -> 0.1',
    'objective.beta: 0.5 -> 0.3',
  ]
  other = differences(first, to_dict(tiny.make_config('sft')))
  assert "objective.kind: 'dpo' -> 'sft'" in other and 'objective.beta: 0.5 -> None' in other


def test_config_files_take_an_argument(tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'x.py'
  file.write_text('def get_config(arg="none"):\n  return {"arg": arg}\n')
  assert load_config(str(file)) == {'arg': 'none'}
  assert load_config(f'{file}:some') == {'arg': 'some'}
  with pytest.raises(UserError, match='no config file'):
    load_config(str(tmp_path / 'y.py'))
  file.write_text('x = 1\n')
  with pytest.raises(UserError, match='must define get_config'):
    load_config(str(file))
  file.write_text('def get_config():\n  return {}\n')
  with pytest.raises(UserError, match="x.py:some: its get_config takes no argument, here 'some'"):
    load_config(f'{file}:some')
  with pytest.raises(UserError, match="sft.py:al: argument 'al': expected one of all"):
    load_config('configs/sft.py:al')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('import no_such_module\n', 'x.py:1: ModuleNotFoundError: No module'),
    ('def get_config():\n  return undefined\n', 'x.py:2: NameError: '),
    ('def get_config():\n  return (\n', "x.py:2: '\\(' was never closed"),
  ],
)
def test_a_config_file_that_fails_says_where(text: str, words: str, tmp_path: pathlib.Path) -> None:
  file = tmp_path / 'x.py'
  file.write_text(text)
  with pytest.raises(UserError, match=words):
    load_config(str(file))
