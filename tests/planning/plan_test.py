"""Plans against the live bytes and the programs of real stages on eight simulated devices."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import ConfigError, UserError
from rlhf_jax.config import EvaluationConfig, InitConfig, RewardModelInitConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.planning import arithmetic, hlo, programs, report
from rlhf_jax.planning import plan as plans
from rlhf_jax.planning.accelerators import ACCELERATORS, judged
from rlhf_jax.planning.arithmetic import Rows, cache_bytes
from rlhf_jax.planning.programs import CompiledProgram, device_bytes
from rlhf_jax.planning.stage import abstract_batch, plan_stage
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh
from tests import tiny

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def live_bytes() -> dict[int, int]:
  """Bytes of all live arrays that lie on all devices, by device: constants lie on the first."""
  gc.collect()
  held = dict.fromkeys((device.id for device in jax.devices()), 0)
  whole = [array for array in jax.live_arrays() if len(array.sharding.device_set) == len(held)]
  for array in whole:
    for shard in array.addressable_shards:
      held[shard.device.id] += shard.data.nbytes
  return held


def make_config(case: str, parents: Path) -> Any:
  """A tiny stage on all eight devices."""
  return tiny.make_config(case, parents, mesh=MESH)


@pytest.fixture(scope='module')
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Finished parents of three layers."""
  folder = tmp_path_factory.mktemp('deep')
  model = dataclasses.replace(tiny.MODEL, layers=3)
  with tiny.devices(1):
    for case in ('sft', 'reward_model'):
      config = tiny.make_config(case, folder, steps=1, model=model)
      stages.run_stage(config, folder / case, root=folder)
  return folder


def traced(function: Any, arguments: Any, *_: Any) -> CompiledProgram:
  """In the place of compiling, where nobody asks what a program takes."""
  jax.eval_shape(function, *arguments)
  return CompiledProgram(0, 0, 0.0, hlo.Program((), (), 0), 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures('young_heap')
@pytest.mark.parametrize(
  ('case', 'adapter'),
  [
    ('ppo', 'none'),
    ('dpo', 'lora'),
    ('reward_model', 'none'),
    ('ilql', 'none'),
    ('judged dpo', 'none'),
    ('valued ppo', 'last_layers'),
  ],
)
def test_what_is_resident_is_what_lives_on_the_devices(
  case: str, adapter: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What the plan says stays on a device: live bytes of a real stage's, within 5%."""
  parents = request.getfixturevalue('deep' if adapter == 'last_layers' else 'parents')
  config = make_config(case.split()[-1], parents)
  config.adapter = AdapterConfig(method=adapter)
  config.model = ModelConfig() if config.policy.init is not None else config.model
  if case.startswith('judged'):  # evaluations along the run ask the reward model
    config.evaluation.prompts = 8
    config.reward_model = RewardModelInitConfig(init=str(parents / 'reward_model'))
  if case.startswith('valued'):  # a value trunk that starts from the reward model
    config.objective.value_model = 'reward_model'
  before = live_bytes()
  built = tiny.build_recipe(config, 8)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    built.recipe.prepare(state, built.recipe.batch(0))  # the reference is loaded when it is needed
  after = live_bytes()
  monkeypatch.setattr(programs, '_compile', traced)
  planned = plans.make_plan(plan_stage(config, make_mesh(MESH), 0)).held
  for device, held in after.items():
    assert held - before[device] == pytest.approx(planned, rel=0.05)
  del state, built


@pytest.mark.slow
def test_a_plan_of_ppo_has_every_role(parents: Path) -> None:
  """Memory by role, operations by program and role, traffic by axis, verdicts; all as JSON too."""
  config = make_config('ppo', parents)
  plan = plans.make_plan(plan_stage(config, make_mesh(MESH), 0))
  assert set(plan.programs) == {'generation', 'scoring', 'update'}
  roles = {'policy', 'value_head', 'optimizer', 'reference (frozen)', 'reward_model (frozen)'}
  assert roles <= set(plan.resident)
  assert set(plan.flops['scoring']) == {'policy', 'reference', 'reward_model'}
  built = tiny.build_recipe(config, 8)
  state = built.recipe.abstract
  assert plan.resident['policy'] == device_bytes(state.params['policy'])
  assert plan.resident['optimizer'] == device_bytes(state.opt_state)
  assert plan.cache > 0 and plan.gradients >= plan.resident['policy']
  own = plan.estimates['H100']
  assert set(own.reading) == set(plan.flops['scoring'])
  large = own._replace(reading=own.reading | {'reward_model': 1e9})
  large_peak = dataclasses.replace(plan, estimates={'H100': large}).estimated_peak('H100')
  assert large_peak - plan.held == pytest.approx(1e9, rel=1e-3)
  axes = {each.axes for program in plan.programs.values() for each in program.read.collectives}
  assert {'fsdp', 'tensor'} <= axes
  text = '\n'.join(report.lines(plan, 'H100'))
  assert 'H100: fits' in text and 'key-value cache' in text and 'over fsdp' in text
  assert len([line for line in report.lines(plan, None) if ': fits' in line]) == len(ACCELERATORS)
  assert json.loads(json.dumps(plans.as_json(plan)))['devices'] == 8
  small = dataclasses.replace(plan, resident={'policy': int(79e9)})
  assert 'H100: does not fit' in '\n'.join(report.lines(small, 'h100'))
  assert 'B200: fits, with xla attention' in '\n'.join(report.lines(small, 'B200'))


def test_attention_is_planned_as_each_accelerator_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
  """Scores are held where no kernel can compute them; what training refuses is said."""
  monkeypatch.setattr(programs, '_compile', traced)

  def planned(**changes: Any) -> plans.Plan:
    config = tiny.make_config('sft', mesh=MESH)
    config.model = dataclasses.replace(tiny.MODEL, **changes)
    return plans.make_plan(plan_stage(config, make_mesh(MESH), 0))

  def activations(plan: plans.Plan, name: str) -> float:
    return plan.estimates[name].activations['policy'].total

  capped = planned(attention='auto', attention_softcap=50.0)
  assert capped.estimates['H100'].attention == {'policy': 'xla'}
  assert activations(capped, 'H100') == activations(planned(), 'H100')
  half = planned(attention='auto', dtype='bfloat16', head_dim=256)
  kinds = {name: each.attention['policy'] for name, each in half.estimates.items()}
  assert (kinds['A100'], kinds['H100'], kinds['v5e']) == ('xla', 'cudnn', 'splash')
  assert activations(half, 'A100') > activations(half, 'H100')
  lines = '\n'.join(report.lines(half, None))
  assert 'estimate on A100: ' in lines and 'estimate on H100, H200' in lines
  assert 'A100: fits, with xla attention' in lines and 'H100: fits, with cudnn' in lines
  refused = '\n'.join(report.lines(planned(attention='cudnn'), None))
  assert (
    "H100: training would refuse it. --config.model.attention='cudnn': expected model.dtype"
    in (refused)
  )
  assert 'v5e: training would refuse it' in refused and ': fits' not in refused
  windows = planned(attention='splash', scan_layers=True, layers=2, window=3, window_pattern='LG')
  assert 'all see as far' in (windows.estimates['v5e'].objection or '')
  unrolled = planned(attention='splash', layers=3, window=3, window_pattern='LG')
  assert unrolled.estimates['v5e'].attention == {'policy': 'splash'}


@pytest.mark.slow
def test_evaluations_are_planned_beside_the_step(parents: Path) -> None:
  """Many more rows than a step's need more memory; the step costs no more operations."""
  config = make_config('dpo', parents)
  config.reward_model = RewardModelInitConfig(init=str(parents / 'reward_model'))
  config.evaluation = EvaluationConfig(prompts=1, records=1, batch_size=64 * tiny.ROWS)
  asked = plans.make_plan(plan_stage(config, make_mesh(MESH), 0))
  assert set(asked.evaluations) == {'answers', 'KL', 'scores', 'records'}
  rows = Rows(64 * tiny.ROWS, config.data.prompt_length, config.data.response_length)
  model = plan_stage(config, make_mesh(MESH), 0).model
  assert asked.cache == cache_bytes(model, rows, asked.mesh) > 0
  largest = max(program.temporary + program.extra for program in asked.evaluations.values())
  assert asked.compiled_peak == asked.held + largest
  assert 'evaluation, answers' in '\n'.join(report.lines(asked, 'H100'))
  assert plans.as_json(asked)['evaluations'].keys() == asked.evaluations.keys()
  config.evaluation = EvaluationConfig(prompts=0, records=0)
  alone = plans.make_plan(plan_stage(config, make_mesh(MESH), 0))
  assert not alone.evaluations and alone.cache == 0
  assert alone.flops == asked.flops and alone.compiled_peak < asked.compiled_peak


@pytest.mark.slow
@pytest.mark.parametrize('method', ['none', 'lora'])
def test_sampling_on_a_mesh_of_its_own_is_planned(method: str, parents: Path) -> None:
  """Its weights are a copy, of which each pair of devices has one; nothing else is otherwise."""
  config = tiny.make_config('rloo', parents, mesh=MeshConfig(data=1, fsdp=8))
  config.adapter = AdapterConfig(method=method, rank=2)
  here = plans.make_plan(plan_stage(config, make_mesh(config.mesh), 0))
  config.rollout.sampling_tensor = 2
  stage = plan_stage(config, make_mesh(config.mesh), 0)
  there = plans.make_plan(stage)
  assert there.resident == here.resident and there.flops == here.flops
  count = there.parameters['policy'] + (0 if method == 'none' else there.parameters['reference'])
  copied = there.sampling_weights - arithmetic.sampling_weights(
    stage.model, {'data': 4, 'fsdp': 1, 'tensor': 2}, gathered=False
  )
  # Norms and what else is not cut is whole on both.
  assert 4 * count / 2 <= copied < 1.2 * 4 * count / 2
  gathered = [
    {kind.axes for kind in plan.programs['generation'].read.collectives} for plan in (here, there)
  ]
  assert any('fsdp' in axes for axes in gathered[0])
  assert not any('fsdp' in axes for axes in gathered[1])


def test_parents_need_not_have_been_run() -> None:
  """A config stands for its stage; the vocabulary of the embedded task is known."""
  config = tiny.make_config('dpo', mesh=MESH, policy=InitConfig(init='configs/sft.py'))
  config.model = ModelConfig()
  stage = plan_stage(config, make_mesh(MeshConfig(data=8)), 0)
  assert stage.model.vocab_size > 10 and set(stage.frozen()) == {'reference'}
  batch = abstract_batch(config)
  assert batch.sequences.response.shape == (tiny.ROWS, 2, 6)


def test_what_a_plan_cannot_know_is_asked_for() -> None:
  """The vocabulary of other data; a device that the table lacks."""
  config = tiny.make_config('sft', mesh=MESH)
  config.data = DataConfig(source='jsonl', path='nowhere.jsonl')
  with pytest.raises(ConfigError, match='--vocab_size'):
    plan_stage(config, make_mesh(MESH), 0)
  assert plan_stage(config, make_mesh(MESH), 96).model.vocab_size == 96
  with pytest.raises(UserError, match='H100'):
    judged('abacus')


GOLDEN = Path(__file__).resolve().parent.parent / 'golden' / 'hf'


@pytest.mark.parametrize(
  ('case', 'policy', 'judge', 'message'),
  [
    ('dpo', GOLDEN / 'llama_scorer', None, 'policy.init.*what trains a policy'),
    ('dpo', 'configs/reward_model.py', None, 'policy.init.*what trains a policy'),
    ('dpo', (GOLDEN / 'trial_llama', 'best'), None, "has 'final' parameters only"),
    ('dpo', ('configs/sft.py', 'best'), None, 'policy.checkpoint.*checkpoint.best_metric'),
    (
      'ppo',
      GOLDEN / 'trial_llama',
      GOLDEN / 'llama2',
      'reward_model.init.*what trains a reward model',
    ),
    ('ppo', 'configs/sft.py', 'configs/sft.py', 'reward_model.init.*what trains a reward model'),
    ('ppo', 'configs/sft.py', GOLDEN / 'llama_scorer', 'ids of the policy, not 37'),
    ('ppo', GOLDEN / 'trial_llama', 'judge', "a reward model with the policy's tokenizer"),
  ],
)
def test_stages_that_training_refuses_are_not_planned(
  case: str, policy: Any, judge: Any, message: str, tmp_path: Path
) -> None:
  """Parents of the other kind, without the checkpoint, or with another vocabulary."""
  if judge == 'judge':  # as many embeddings as the policy, and other tokens
    judge = shutil.copytree(GOLDEN / 'llama_scorer', tmp_path / 'judge')
    tokenizers.train('word', ['some other words'], 0).save(judge)
  init, checkpoint = policy if isinstance(policy, tuple) else (policy, 'final')
  config = tiny.make_config(case, mesh=MESH, model=ModelConfig())
  config.policy = InitConfig(init=str(init), checkpoint=checkpoint)
  if judge is not None:
    config.reward_model = RewardModelInitConfig(init=str(judge))
  with pytest.raises(UserError, match=message):
    plan_stage(config, make_mesh(MESH), 0)


def test_a_config_that_training_refuses_is_no_parent(tmp_path: Path) -> None:
  """What is wrong in it is said, with the file it is in."""
  file = tmp_path / 'parent.py'
  file.write_text(
    'from tests import tiny\n\n\ndef get_config():\n'
    '  config = tiny.make_config("sft")\n  config.model.remat = "some"\n  return config\n'
  )
  config = tiny.make_config('dpo', mesh=MESH, policy=InitConfig(init=str(file)))
  with pytest.raises(ConfigError, match="policy.init.*parent.py.*Of that one.*remat='some'"):
    plan_stage(config, make_mesh(MESH), 0)


def test_value_trunks_are_planned_as_the_stage_computes() -> None:
  """A reward model's decoder, with the recomputing and the type of the policy."""
  config = tiny.make_config('ppo', mesh=MESH, policy=InitConfig(init='configs/sft.py'))
  config.model = ModelConfig(remat='full', dtype='bfloat16', vocab_chunk=8)
  config.reward_model = RewardModelInitConfig(init='configs/reward_model.py')
  judge = plan_stage(config, make_mesh(MESH), 0).reward_models['reward_model'].model
  assert (judge.remat, judge.dtype, judge.vocab_chunk) == ('full', 'bfloat16', 8)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['lora', 'last_layers'])
def test_training_in_part_is_planned(method: str, parents: Path) -> None:
  """The optimizer has what is trained alone; the reference is what stays, at no further memory."""
  config = tiny.make_config('dpo', mesh=MESH, policy=InitConfig(init='configs/sft.py'))
  config.adapter = AdapterConfig(method=method)
  config.model = ModelConfig()
  stage = plan_stage(config, make_mesh(MeshConfig(data=8)), 0)
  plan = plans.make_plan(stage)
  assert plan.resident['policy'] < plan.resident['reference (frozen)']
  assert plan.resident['optimizer'] == pytest.approx(2 * plan.resident['policy'], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case',
  ['cpl_scored', 'orpo', 'kto', 'alol', 'reward_listwise', 'reward_process', 'grpo', 'best_of_n'],
)
def test_every_kind_of_objective_can_be_trained_in_part(
  case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Scoring, samples and update are traced: of the decoder only the matrices are in the state."""
  monkeypatch.setattr(programs, '_compile', traced)
  config = tiny.make_config(case, mesh=MESH, policy=InitConfig(init='configs/sft.py'))
  config.adapter, config.model = AdapterConfig(method='lora', targets=('*',)), ModelConfig()
  if case in ('grpo', 'best_of_n'):
    config.reward_model = RewardModelInitConfig(init='configs/reward_model.py')
  config.validate()
  state = programs.compile_stage(plan_stage(config, make_mesh(MESH), 0)).state
  (trained,) = state.params.values()
  leaves = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
  heads = {'kernel', 'bias', 'gain'} if case.startswith('reward') else set()
  assert leaves == {'lora_a', 'lora_b'} | heads


def test_a_checkpoint_folder_needs_no_weights_to_be_planned(tmp_path: Path) -> None:
  """Its config.json says all: a Llama of 8B parameters."""
  values = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 128_256,
    'hidden_size': 4096,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'intermediate_size': 14_336,
    'max_position_embeddings': 8192,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500_000.0,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
  }
  (tmp_path / 'config.json').write_text(json.dumps(values), 'utf-8')
  config = tiny.make_config('dpo', mesh=MESH, policy=InitConfig(init=str(tmp_path)))
  config.model = ModelConfig(dtype='bfloat16')
  stage = plan_stage(config, make_mesh(MESH), 0)
  sizes = [leaf.size for leaf in jax.tree.leaves(stage.frozen()['reference'])]
  assert sum(sizes) == pytest.approx(8.03e9, rel=0.01)
  assert stage.model.dtype == 'bfloat16' and stage.model.scan_layers
