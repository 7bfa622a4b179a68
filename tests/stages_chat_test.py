"""Stages on dialogues, with a tokenizer folder of Hugging Face's and with one trained in place."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import stages
from rlhf_jax.common.errors import ConfigError
from rlhf_jax.common.types import Sequences
from rlhf_jax.data import pipeline, tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.feedback.records import Demonstration
from rlhf_jax.models import decoder, roles
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.objectives import sft
from rlhf_jax.objectives.base import Actors
from rlhf_jax.recipes.completions import make_completer
from rlhf_jax.recipes.finished import open_run
from rlhf_jax.runs import Run
from rlhf_jax.sharding.mesh import make_mesh
from tests import tiny
from tests.data import folders
from tests.data.folders import dialogue

TALK = dialogue('u:Hello there', 'a:I am fine.', 'u:And you?', 'a:twice')
LINES = [
  {'messages': [dataclasses.asdict(message) for message in TALK]},
  {'messages': [dataclasses.asdict(message) for message in TALK[:2]]},
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: Any) -> pathlib.Path:
  made: pathlib.Path = tmp_path_factory.mktemp('chat')
  folders.gpt2(made / 'tokenizer')
  (made / 'data.jsonl').write_text('\n'.join(map(json.dumps, LINES * 8)))
  return made


def _config(folder: pathlib.Path, **data: Any) -> Any:
  settings: dict[str, Any] = {
    'source': 'jsonl',
    'path': str(folder / 'data.jsonl'),
    'tokenizer': str(folder / 'tokenizer'),
    'prompt_length': 24,
    'response_length': 40,
    'held_out': 0.0,
    **data,
  }
  config = tiny.make_config('sft', steps=2)
  return dataclasses.replace(config, data=DataConfig(**settings))


def _run(config: Any, folder: pathlib.Path, name: str) -> Run:
  with tiny.devices(1):
    stages.run_stage(config, folder / name, root=folder)
  return Run(folder / name)


def test_the_gradient_at_other_turns_is_exactly_zero(folder: pathlib.Path) -> None:
  """The model reads them: another question changes the loss of the answer behind it."""
  tokenizer = tokenizers.load(folder / 'tokenizer')
  config = DataConfig(prompt_length=24, response_length=40)
  records = [Demonstration(TALK[:1], TALK[1:]), Demonstration(TALK[:1], 'I am fine.')]
  batch: Any = pipeline.encode_demonstrations(records, tokenizer, config).take(np.arange(2))
  model = ModelConfig(width=8, layers=1, heads=1, mlp_width=8, vocab_size=tokenizer.vocab_size)
  params = decoder.init(model, jax.random.key(0))

  @jax.jit
  def loss(slack: jax.Array, batch: Sequences) -> jax.Array:
    """`slack` is added to every log-prob."""

    def policy(params: Any, sequences: Sequences) -> Any:
      output = roles.policy_output(model, params, sequences, temperature=1.0)
      return dataclasses.replace(output, logprobs=output.logprobs + slack)

    return sft.loss(sft.SFTConfig(), Actors(policy=policy), params, batch)[0].total

  slack = jnp.zeros(batch.response.shape)
  slopes = jax.grad(loss)(slack, batch)
  np.testing.assert_array_equal(slopes, np.where(batch.loss_mask, -1.0, 0.0))
  unread = batch.response_mask & ~batch.loss_mask
  assert unread[0].any() and not unread[1].any()
  place = np.flatnonzero(unread[0])[-4]
  other = batch.response.copy()
  other[0, place] = tokenizer.encode_batch(['x'])[0][0]
  changed = dataclasses.replace(batch, response=other)
  assert loss(slack, changed) != loss(slack, batch)
  # And only by what follows: the changed token itself is nobody's target.
  masked = dataclasses.replace(
    changed, loss_mask=batch.loss_mask & (np.arange(other.shape[1]) < place)
  )
  same = dataclasses.replace(batch, loss_mask=masked.loss_mask)
  assert loss(slack, masked) == loss(slack, same)


@pytest.mark.slow
def test_a_run_keeps_its_template_and_answers_dialogues(folder: pathlib.Path) -> None:
  """A response is ended by the end of turn too, which the tokenizer's files do not call an end."""
  run = _run(_config(folder), folder, 'sft')
  tokenizer = run.tokenizer()
  assert tokenizer.template == folders.CHATML and len(tokenizer.stop_ids) == 2
  end = tokenizer.stops[0]
  mesh = make_mesh(run.config.mesh, jax.devices()[:1])
  nothing = Feedback('nothing', Split(), Split())
  config = dataclasses.replace(
    run.config, data=dataclasses.replace(run.config.data, response_length=200)
  )
  opened = open_run(run, config, nothing, mesh, parents={})
  found = make_completer(opened)([TALK[:1], TALK[:3], 'Hello'], jax.random.key(0), 20)
  assert [one.prompt for one in found[::20]] == [
    '<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n',
    tokenizer.render(TALK[:3], ask=True),
    'Hello',
  ]
  assert len(found[0].prompt_tokens) <= 24 and found[0].prompt_tokens_cut == 0
  assert found[20].prompt_tokens_cut > 0
  ends = {one.tokens[-1] for one in found if one.finished}
  assert ends == {tokenizer.eos_id, end}
  for one in found:
    assert not set(one.tokens[:-1]) & set(tokenizer.stop_ids)
    assert not one.text.endswith('<|im_end|>')


@pytest.mark.slow
def test_a_template_that_is_named_is_learnt_with_and_kept(folder: pathlib.Path) -> None:
  """Its words are in the vocabulary of a tokenizer that is trained; a file that changes counts."""
  (folder / 'my.jinja').write_text(
    '{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}'
  )
  config = _config(folder, tokenizer='word', chat_template=str(folder / 'my.jinja'))
  run = _run(config, folder, 'word')
  tokenizer = run.tokenizer()
  (ids,) = tokenizer.encode_batch(['user: assistant: Hello'])
  assert tokenizer.decode(ids) == 'user: assistant: Hello'
  assert tokenizer.template == (folder / 'my.jinja').read_text()
  before = stages.resolve(config, folder).identity
  (folder / 'my.jinja').write_text(
    '{% for m in messages %} {{ m.role }}! {{ m.content }}{% endfor %}'
  )
  assert stages.resolve(config, folder).identity != before


def test_dialogues_need_a_template(folder: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match="data.chat_template='': expected a file with a jinja"):
    _run(_config(folder, tokenizer='byte'), folder, 'none')
