"""Fewer slots than rows, and prompts read once: the same responses, by less work."""

from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.generation.samples import Samples, repeat_prompts
from rlhf_jax.models import decoder
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh, put_batch
from tests.generation.sample_test import EOS, PAD, P, assert_well_formed, make_prompts, sample
from tests.models.architectures import make_config


def assert_same(actual: Samples, expected: Samples) -> None:
  """The same tokens; log-probs up to what products of other sizes round otherwise."""
  for name in ('tokens', 'mask', 'finished'):
    np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize('slots', [1, 3, 8, 23])
@pytest.mark.parametrize(
  ('name', 'scan_layers'), [('default', False), ('gemma3', False), ('gemma3', True), ('gpt2', True)]
)
def test_slots_change_nothing(name: str, scan_layers: bool, slots: int) -> None:
  """Rows of all lengths, some cut at the longest, through a few slots, windows and all."""
  model, prompts = make_config(name, scan_layers=scan_layers), make_prompts(23)
  stops = (1, 2, 5)
  expected = sample(model, prompts, stop_tokens=stops)
  lengths = np.asarray(expected.mask.sum(1))
  assert len(set(lengths.tolist())) > 3
  actual = sample(model, prompts, stop_tokens=stops, slots=slots)
  assert_same(actual, expected)
  assert_well_formed(actual, (EOS, *stops), PAD)


@pytest.mark.parametrize('slots', [0, 5, 100])
def test_copies_change_nothing(slots: int) -> None:
  """Copies of a prompt that is read once are sampled as rows with prompts of their own are."""
  model, prompts = make_config(), make_prompts(4)
  expected = sample(model, repeat_prompts(prompts, 3))
  assert_same(sample(model, prompts, samples=3, slots=slots), expected)
  assert len({tuple(row) for row in expected.tokens.tolist()}) == 12


@pytest.mark.parametrize('samples', [1, 2])
def test_prompts_of_one_token(samples: int) -> None:
  """Nothing is read before the loop."""
  model = make_config()
  prompts = jax.tree.map(lambda leaf: leaf[:, -1:] if leaf.ndim > 1 else leaf, make_prompts())
  expected = sample(model, repeat_prompts(prompts, samples))
  assert_same(sample(model, prompts, samples=samples, slots=2), expected)


@pytest.mark.parametrize('copies', [1, 2])
@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_slots_on_a_mesh(sizes: tuple[int, int, int], copies: int) -> None:
  """Every part of the mesh works off its own rows; which ones, does not show."""
  model, prompts = make_config(), make_prompts(16)
  expected = sample(model, repeat_prompts(prompts, copies))
  mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
  with jax.set_mesh(mesh):
    actual = sample(model, put_batch(prompts, mesh), samples=copies, slots=8)
  assert_same(jax.device_get(actual), expected)


def test_fewer_steps_than_one_batch_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
  """Where few rows are long, slots that go on cost less than batches that wait for the last."""
  steps: list[int] = []
  compute = decoder.hidden_states

  def counted(*args: Any, **kwargs: Any) -> Any:
    jax.debug.callback(lambda: steps.append(args[2].shape[1]))
    return compute(*args, **kwargs)

  model, prompts, rows, slots = make_config(layers=1), make_prompts(32), 32, 8
  monkeypatch.setattr(decoder, 'hidden_states', counted)
  samples = sample(model, prompts, slots=slots, stop_tokens=tuple(range(9)))
  jax.effects_barrier()
  lengths = np.asarray(samples.mask.sum(1))
  batches = sum(lengths[start : start + slots].max() for start in range(0, rows, slots))
  assert steps[0] == P - 1 and set(steps[1:]) == {1}
  assert lengths.sum() / slots <= len(steps) - 1 < 0.85 * batches


def test_no_samples_are_refused() -> None:
  with pytest.raises(ValueError, match='samples=0'):
    sample(make_config(), make_prompts(), samples=0)
