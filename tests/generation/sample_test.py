"""Samples are what the model says, end where they should, and do not depend on their neighbours."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError
from rlhf_jax.common.types import Prompts
from rlhf_jax.generation.config import GenerationConfig
from rlhf_jax.generation.sample import generate
from rlhf_jax.generation.samples import Samples, repeat_prompts, samples_to_sequences
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig
from tests.models import reference
from tests.models.architectures import make_config, make_params, make_tokens

B, P, R = 6, 5, 12
EOS, PAD = 3, 0


def make_prompts(rows: int = B, columns: int = P) -> Prompts:
  """Prompts of one to five tokens, numbered from 10, left-padded to `columns`."""
  start = columns - 1 - jnp.arange(rows)[:, None] % P
  tokens = jnp.pad(make_tokens(rows, P), ((0, 0), (columns - P, 0)), constant_values=7)
  return Prompts(
    tokens=tokens,
    mask=jnp.arange(columns) >= start,
    index=jnp.arange(10, 10 + rows, dtype=jnp.int32),
  )


def sample(
  model: ModelConfig,
  prompts: Prompts,
  *,
  eos_id: int = EOS,
  pad_id: int = PAD,
  samples: int = 1,
  **settings: Any,
) -> Samples:
  """So many samples of each prompt from the model with its test parameters."""
  asked = (tuple(vars(model).items()), eos_id, pad_id, samples, tuple(settings.items()))
  return _compiled(*asked)(make_params(model), prompts)


@functools.cache
def _compiled(model: Any, eos_id: int, pad_id: int, samples: int, settings: Any) -> Any:
  def apply(params: Any, prompts: Prompts) -> Samples:
    return generate(
      ModelConfig(**dict(model)),
      params,
      prompts,
      jax.random.key(1),
      config=GenerationConfig(**dict(settings)),
      max_new_tokens=R,
      eos_id=eos_id,
      pad_id=pad_id,
      samples=samples,
    )

  return jax.jit(apply)


def assert_well_formed(samples: Samples, stops: tuple[int, ...], pad_id: int) -> None:
  """Every response runs to its first stop token or to the end; nothing is left behind it."""
  tokens, mask, logprobs, finished = (
    np.asarray(x) for x in (samples.tokens, samples.mask, samples.logprobs, samples.finished)
  )
  for row in range(len(tokens)):
    stopped = np.flatnonzero(np.isin(tokens[row, : mask[row].sum()], stops))
    length = R if len(stopped) == 0 else stopped[0] + 1
    assert mask[row].tolist() == [column < length for column in range(R)]
    assert finished[row] == (len(stopped) > 0)
    assert np.all(tokens[row, length:] == pad_id) and np.all(logprobs[row, length:] == 0.0)
    assert np.all(logprobs[row, :length] < 0.0)


@pytest.mark.parametrize(
  ('name', 'scan_layers', 'settings'),
  [
    ('default', False, dict()),
    ('gpt2', False, dict(temperature=0.0)),
    ('gemma2', False, dict(temperature=0.7, top_p=0.8)),
    ('gemma3', True, dict(temperature=1.3, top_k=8, top_p=0.9)),
  ],
)
def test_logprobs_equal_teacher_forced_ones(
  name: str, scan_layers: bool, settings: dict[str, Any]
) -> None:
  """Those of the unfiltered distribution at the temperature (1 where it is 0), to 1e-5."""
  model = make_config(name, scan_layers=scan_layers)
  prompts = make_prompts()
  samples = sample(model, prompts, **settings)
  assert samples.logprobs.dtype == jnp.float32 and samples.tokens.dtype == jnp.int32
  assert_well_formed(samples, (EOS,), PAD)
  temperature = settings.get('temperature', 1.0)
  temperature = temperature if temperature > 0 else 1.0
  output = jax.jit(lambda p, s: roles.policy_output(model, p, s, temperature=temperature))(
    make_params(model), samples_to_sequences(prompts, samples)
  )
  difference = np.abs(output.logprobs - samples.logprobs)[samples.mask]
  assert difference.max() < 1e-5


def test_greedy_decoding_is_the_argmax_of_the_reference() -> None:
  """Temperature 0 gives the likeliest token of the float64 decoder, every time."""
  model, prompts = make_config('qwen2'), make_prompts()
  samples = sample(model, prompts, temperature=0.0)
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), make_params(model))
  for row in range(B):
    seen = np.asarray(prompts.tokens[row])[np.asarray(prompts.mask[row])]
    for token in np.asarray(samples.tokens[row])[np.asarray(samples.mask[row])]:
      assert token == reference.logits(model, params, seen)[-1].argmax()
      seen = np.append(seen, token)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
  """Alone, in another order, or with more padding, a numbered prompt gets the same response."""
  model, prompts = make_config(), make_prompts()
  together = sample(model, prompts)
  order = jnp.asarray([4, 2, 5, 0, 3, 1])
  permuted = sample(model, jax.tree.map(lambda x: x[order], prompts))
  alone = sample(model, jax.tree.map(lambda x: x[2:3], prompts))
  padded = sample(model, make_prompts(columns=P + 4))
  for name in ('tokens', 'mask', 'finished'):
    expected = getattr(together, name)
    np.testing.assert_array_equal(getattr(permuted, name), expected[order])
    np.testing.assert_array_equal(getattr(alone, name), expected[2:3])
    np.testing.assert_array_equal(getattr(padded, name), expected)
  np.testing.assert_allclose(padded.logprobs, together.logprobs, atol=1e-5)


def test_rows_with_other_numbers_draw_other_tokens() -> None:
  """Equal prompts: equal numbers give equal responses, different numbers different ones."""
  model, prompts = make_config(), make_prompts()
  prompts = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), prompts)
  same = sample(model, prompts, eos_id=-1).tokens
  assert np.all(same == same[0])
  others = sample(model, dataclasses.replace(prompts, index=jnp.arange(B)), eos_id=-1).tokens
  assert len({tuple(row) for row in others.tolist()}) == B


def test_without_an_end_of_sequence_responses_have_a_fixed_length() -> None:
  """eos_id -1: every column is real, no row is finished."""
  samples = sample(make_config(), make_prompts(), eos_id=-1)
  assert np.all(samples.mask) and not np.any(samples.finished)
  assert np.any(samples.tokens == EOS)


@pytest.mark.parametrize('pad_id', [EOS, 11])
def test_padding_may_be_sampled_and_may_stop(pad_id: int) -> None:
  """The mask comes from when a row stopped, also where the padding id ends responses or is drawn.

  The tokens are those that any other padding id gives.
  """
  model, prompts = make_config(), make_prompts()
  samples, others = sample(model, prompts, pad_id=pad_id), sample(model, prompts)
  assert_well_formed(samples, (EOS,), pad_id)
  np.testing.assert_array_equal(samples.mask, others.mask)
  np.testing.assert_array_equal(samples.tokens[samples.mask], others.tokens[samples.mask])
  assert np.any(samples.tokens[samples.mask] == pad_id)


def test_stop_tokens_end_responses_too() -> None:
  """Whichever comes first, besides the end of sequence or instead of it."""
  model, prompts = make_config(), make_prompts()
  both = sample(model, prompts, stop_tokens=(5, 8))
  assert_well_formed(both, (EOS, 5, 8), PAD)
  assert np.any(both.mask.sum(1) < sample(model, prompts).mask.sum(1))
  assert_well_formed(sample(model, prompts, eos_id=-1, stop_tokens=(5, 8)), (5, 8), PAD)


def test_decoding_ends_with_the_longest_response(monkeypatch: pytest.MonkeyPatch) -> None:
  """The model reads the prompt but its last token, then once for each token of the longest."""
  calls: list[int] = []
  original = decoder.hidden_states

  def counted(config: Any, params: Any, tokens: jax.Array, mask: jax.Array, **rest: Any) -> Any:
    jax.debug.callback(lambda: calls.append(tokens.shape[1]))
    return original(config, params, tokens, mask, **rest)

  monkeypatch.setattr(decoder, 'hidden_states', counted)
  model = make_config(layers=1)
  samples = sample(model, make_prompts(), stop_tokens=tuple(range(9)))
  jax.effects_barrier()
  longest = int(samples.mask.sum(1).max())
  assert 1 < longest < R
  assert calls == [P - 1] + [1] * longest


def test_sequences_hold_prompts_and_samples() -> None:
  """Nothing is moved or masked anew."""
  prompts = make_prompts()
  samples = sample(make_config(), prompts)
  sequences = samples_to_sequences(prompts, samples)
  np.testing.assert_array_equal(sequences.prompt, prompts.tokens)
  np.testing.assert_array_equal(sequences.prompt_mask, prompts.mask)
  np.testing.assert_array_equal(sequences.response, samples.tokens)
  np.testing.assert_array_equal(sequences.response_mask, samples.mask)


def test_a_readout_decides_what_is_drawn() -> None:
  """Logits shifted by a function of the hidden states: drawn from, and their log-probs reported.

  Compared with the teacher-forced hidden states of the same tokens. The readout's parameters are an
  argument of the compiled program: other values, given to the same program, draw other tokens.
  """
  model, prompts = make_config(), make_prompts()
  params = make_params(model)
  calls: list[int] = []

  @jax.jit
  def shifted(params: Any, shift: jax.Array, prompts: Prompts) -> Samples:
    calls.append(1)

    def readout(hidden: jax.Array) -> jax.Array:
      return decoder.logits(model, params, hidden) + hidden @ shift

    return generate(
      model,
      params,
      prompts,
      jax.random.key(1),
      config=GenerationConfig(temperature=0.7),
      max_new_tokens=R,
      eos_id=EOS,
      pad_id=PAD,
      readout=readout,
    )

  unshifted = sample(model, prompts, temperature=0.7)
  shift = jnp.zeros((model.width, model.vocab_size))
  np.testing.assert_array_equal(shifted(params, shift, prompts).tokens, unshifted.tokens)
  shift = jax.random.normal(jax.random.key(2), shift.shape)
  samples = shifted(params, shift, prompts)
  assert len(calls) == 1 and not np.array_equal(samples.tokens, unshifted.tokens)
  assert_well_formed(samples, (EOS,), PAD)
  tokens = jnp.concatenate([prompts.tokens, samples.tokens], axis=1)
  mask = jnp.concatenate([prompts.mask, samples.mask], axis=1)
  hidden = decoder.hidden_states(model, params, tokens, mask)[0][:, P - 1 : -1]
  logits = (decoder.logits(model, params, hidden) + hidden @ shift) / 0.7
  logprobs = np.asarray(jax.nn.log_softmax(logits))
  expected = np.take_along_axis(logprobs, np.asarray(samples.tokens)[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(
    samples.logprobs, np.where(samples.mask, expected, 0.0), atol=1e-5, rtol=1e-5
  )


def test_a_readout_gives_a_row_of_logits_for_each_prompt() -> None:
  model = make_config()
  with pytest.raises(ShapeError, match='logits: expected 2 axes'):
    generate(
      model,
      make_params(model),
      make_prompts(),
      jax.random.key(0),
      config=GenerationConfig(),
      max_new_tokens=R,
      eos_id=EOS,
      pad_id=PAD,
      readout=lambda hidden: hidden[:, 0],
    )


@pytest.mark.parametrize('host', [False, True])
def test_copies_of_a_prompt_are_adjacent_and_draw_by_themselves(host: bool) -> None:
  """Copy k of prompt number i is row number `i * samples + k`; on the host they stay there."""
  prompts = make_prompts()
  if host:
    prompts = jax.device_get(prompts)
  repeated = repeat_prompts(prompts, 3)
  assert isinstance(repeated.index, np.ndarray) == host
  assert repeated.index.dtype == jnp.int32
  assert repeated.index.tolist() == [3 * i + k for i in range(10, 10 + B) for k in range(3)]
  for row in range(3 * B):
    np.testing.assert_array_equal(repeated.tokens[row], prompts.tokens[row // 3])
    np.testing.assert_array_equal(repeated.mask[row], prompts.mask[row // 3])
  drawn = np.asarray(sample(make_config(), repeated, eos_id=-1).tokens)
  assert len({tuple(row) for row in drawn.tolist()}) == 3 * B


def test_one_copy_of_a_prompt_is_itself_and_none_is_refused() -> None:
  prompts = make_prompts()
  jax.tree.map(np.testing.assert_array_equal, repeat_prompts(prompts, 1), prompts)
  with pytest.raises(ValueError, match='samples=0'):
    repeat_prompts(prompts, 0)


def test_a_response_needs_room() -> None:
  """max_new_tokens below 1 is refused."""
  model = make_config()
  with pytest.raises(ValueError, match='max_new_tokens=0'):
    generate(
      model,
      make_params(model),
      make_prompts(),
      jax.random.key(0),
      config=GenerationConfig(),
      max_new_tokens=0,
      eos_id=EOS,
      pad_id=PAD,
    )
