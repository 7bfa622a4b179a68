"""The policy as it samples: ILQL's tilt by what it learnt, from training to the programs."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common import prng
from rlhf_jax.common.types import Sequences
from rlhf_jax.config import EvaluationConfig
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.models import decoder, q_heads, roles
from rlhf_jax.objectives.ilql import ILQLConfig
from rlhf_jax.recipes.completions import make_completer
from rlhf_jax.recipes.finished import Finished, open_run
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.recipes.policies import make_kl, make_sampler
from rlhf_jax.recipes.probes import prompt_columns
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from rlhf_jax.training.writers import read_rows
from tests import tiny
from tests.experiments.programs import run_program
from tests.models.logits import response_logits

pytestmark = pytest.mark.slow

# Much, for Q learns little in a few steps.
BETA = 20.0
ASKED = EvaluationConfig(prompts=8, records=8, batch_size=tiny.ROWS)


def test_targets_follow_by_polyak(parents: pathlib.Path) -> None:
  """They start as copies of both Q and move by the rate towards what an update made of those.

  V has no slow copy, the policy neither; nothing moves them but this.
  """
  rate = 0.25
  config = tiny.make_config('ilql', parents, objective=ILQLConfig(target_rate=rate))
  built = tiny.build_recipe(config)
  with jax.set_mesh(built.mesh):
    state = built.recipe.init()
    heads = jax.device_get(state.params['q_heads'])
    assert set(state.targets) == {'q_target'} and set(state.targets['q_target']) == {'q1', 'q2'}
    expected = {name: heads[name] for name in ('q1', 'q2')}
    for step in range(3):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        jax.device_get(state.targets['q_target']),
        expected,
      )
      prepared = built.recipe.prepare(state, built.recipe.batch(step))
      state, _ = built.recipe.update(
        dataclasses.replace(state, carry=prepared.carry), prepared.batch
      )
      heads = jax.device_get(state.params['q_heads'])
      expected = jax.tree.map(
        lambda old, new: (1 - rate) * old + rate * new,
        expected,
        {name: heads[name] for name in ('q1', 'q2')},
      )
  moved = np.abs(heads['q1']['out']['kernel'] - expected['q1']['out']['kernel'])
  assert moved.max() > 1e-3, 'Q did not move'


class Trained(NamedTuple):
  """A finished ILQL run, and the folder it lies in."""

  folder: pathlib.Path
  opened: Finished


def opened(folder: pathlib.Path, **generation: Any) -> Finished:
  """The run as an evaluation opens it, its reference beside it."""
  run = Run(folder)
  config = dataclasses.replace(run.config, generation=GenerationConfig(**generation))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  feedback = tiny.feedback_of(config.data.response_length)
  return open_run(run, config, feedback, mesh, parents=run.parents())


@pytest.fixture(scope='module')
def trained(parents: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
  folder = tmp_path_factory.mktemp('ilql') / 'run'
  config = tiny.make_config(
    'ilql',
    parents,
    steps=6,
    objective=ILQLConfig(decode_beta=BETA, target_rate=0.5),
    evaluation=ASKED,
  )
  tiny.run_stage(config, folder)
  return Trained(folder, opened(folder, temperature=0.8))


def slow_head(params: Any, hidden: np.ndarray) -> np.ndarray:
  first, second = (params[name] for name in ('hidden', 'out'))
  units = np.maximum(hidden @ np.asarray(first['kernel']) + np.asarray(first['bias']), 0)
  return units @ np.asarray(second['kernel']) + np.asarray(second['bias'])


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def tilted(parts: Parts, params: Any, sequences: Any, beta: float) -> np.ndarray:
  """log pi + beta (min Q - V) at every response token, `[B, R, V]`, from one pass over them."""
  policy = params['policy']
  states = roles.response_states(parts.model, policy, sequences)
  hidden, size = np.asarray(states, np.float64), parts.model.vocab_size
  logprobs = log_softmax(np.asarray(decoder.logits(parts.model, policy, states), np.float64))
  q = np.minimum(
    *(slow_head(params['q_target'][name], hidden)[..., :size] for name in ('q1', 'q2'))
  )
  return logprobs + beta * (q - slow_head(params['q_heads']['v'], hidden))


def sampled(parts: Any, params: Any) -> tuple[Any, Any]:
  """Responses to the first prompts."""
  columns = prompt_columns(parts, 'train', 8)
  prompts = jax.tree.map(jnp.asarray, columns.take(np.arange(8)))
  return jax.jit(make_sampler(parts))(params, prompts, prng.base_key(3))


def test_the_divergence_in_chunks_holds_no_table_of_all_rows() -> None:
  """The same numbers, without a [B, R, V] array in float32; on eight devices as on one."""
  size, config = 1003, tiny.make_config('ilql')
  rng, length = np.random.default_rng(0), config.data.response_length
  tokens, mask = rng.integers(0, size, (8, length)), np.ones((8, length), bool)
  rows = Sequences(tokens, mask, tokens[::-1], rng.random((8, length)) < 0.7)
  found, lowered = {}, {}
  for chunk, devices in ((None, 1), (64, 1), (64, 8)):
    model = dataclasses.replace(tiny.MODEL, vocab_size=size, vocab_multiple=1, vocab_chunk=chunk)
    heads = q_heads.q_heads_init(model, jax.random.key(1))
    params = {'q_heads': heads, 'q_target': q_heads.target_of(heads)}
    params['policy'] = decoder.init(model, jax.random.key(0))
    reference = {'policy': decoder.init(model, jax.random.key(2))}
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    parts: Any = Parts(config, mesh, None, None, model, {})  # type: ignore[arg-type]
    kl: Any = make_kl(parts)
    with jax.set_mesh(mesh):
      lowered[chunk, devices] = kl.lower(params, reference, rows).as_text()
      found[chunk, devices] = np.asarray(kl(params, reference, put_batch(rows, mesh)))
  whole = f'tensor<8x{length}x{size}xf32>'
  assert whole in lowered[None, 1] and whole not in lowered[64, 1]
  assert found[None, 1].min() > 0.1
  for values in found.values():
    np.testing.assert_allclose(values, found[None, 1], rtol=1e-5)


def test_samples_are_drawn_from_the_tilted_policy(trained: Trained) -> None:
  """Their log-probs, at the temperature, are those of a pass over the whole response."""
  parts: Any = trained.opened.parts
  params = trained.opened.params
  with jax.set_mesh(parts.mesh):
    sequences, samples = sampled(parts, params)
    by_token = tilted(parts, params, sequences, BETA)
    tokens = np.asarray(sequences.response)[..., None]
    expected = np.take_along_axis(log_softmax(by_token / 0.8), tokens, -1)[..., 0]
    plain = np.take_along_axis(
      log_softmax(tilted(parts, params, sequences, 0.0) / 0.8), tokens, -1
    )[..., 0]
  mask = np.asarray(sequences.response_mask)
  np.testing.assert_allclose(np.asarray(samples.logprobs)[mask], expected[mask], atol=1e-4)
  assert np.abs(expected - plain)[mask].max() > 0.05, 'the tilt does nothing here'


def test_the_divergence_is_that_of_the_tilted_policy(trained: Trained) -> None:
  """Exact KL from the plain reference, summed over the response; the reference is not tilted."""
  parts: Any = trained.opened.parts
  params = trained.opened.params
  with jax.set_mesh(parts.mesh):
    sequences, _ = sampled(parts, params)
    found = make_kl(parts)(params, {'policy': parts.reference}, sequences)
    p = log_softmax(tilted(parts, params, sequences, BETA) / 0.8)
    logits = response_logits(parts.model, parts.reference, sequences, temperature=0.8)
    q = log_softmax(np.asarray(logits, np.float64))
  kl = np.where(sequences.response_mask, (np.exp(p) * (p - q)).sum(-1), 0).sum(-1)
  np.testing.assert_allclose(found, kl, rtol=1e-3, atol=1e-4)


def test_without_a_tilt_the_policy_alone_samples(trained: Trained) -> None:
  """With beta 0 the responses are those of the same parameters without any heads."""
  parts: Any = trained.opened.parts
  params = trained.opened.params
  config = dataclasses.replace(parts.config, objective=ILQLConfig(decode_beta=0.0))
  plain = dataclasses.replace(parts, config=config)
  with jax.set_mesh(parts.mesh):
    sequences, _ = sampled(plain, params)
    alone, _ = sampled(plain, {'policy': params['policy']})
    with_tilt, _ = sampled(parts, params)
  np.testing.assert_array_equal(sequences.response, alone.response)
  assert not np.array_equal(with_tilt.response, alone.response)


def test_the_program_that_evaluates_asks_the_tilted_policy(
  trained: Trained, tmp_path: pathlib.Path
) -> None:
  """Its numbers are those of the last evaluation along the run."""
  out = tmp_path / 'out.json'
  done = run_program('evaluate', f'--run={trained.folder}', f'--json={out}')
  assert done.returncode == 0, done.stderr
  metrics = json.loads(out.read_text())['metrics']
  last = read_rows(trained.folder / 'evaluations.jsonl')[-1]
  assert {'kl', 'gold_reward', 'win_rate'} <= metrics.keys()
  for name, metric in metrics.items():
    np.testing.assert_allclose(metric['mean'], last[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_program_that_samples_samples_from_it(trained: Trained, tmp_path: pathlib.Path) -> None:
  """Greedy tokens are those of the tilted policy, and not all those of the policy alone."""
  out = tmp_path / 'out.json'
  prompts = ['the soup was', 'we', 'the', 'not very good']
  done = run_program(
    'sample',
    f'--run={trained.folder}',
    *(f'--prompt={text}' for text in prompts),
    '--temperature=0',
    f'--json={out}',
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads(out.read_text())['samples']
  greedy = opened(trained.folder, temperature=0.0)
  found = make_completer(greedy)(prompts, prng.base_key(0), 1)
  assert [row['tokens'] for row in rows] == [row.tokens for row in found]
  alone = greedy._replace(params={'policy': greedy.params['policy']})
  plain = make_completer(alone)(prompts, prng.base_key(0), 1)
  assert [row.tokens for row in plain] != [row.tokens for row in found]
