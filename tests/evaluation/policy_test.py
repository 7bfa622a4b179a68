"""What is measured of a policy's answers: row by row, fillers left out, ties half."""

from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax.common.types import Prompts, Sequences
from rlhf_jax.evaluation.policy import (
  Answers,
  PolicyProbes,
  answer_prompts,
  decode_sequences,
  wins,
)

WORDS = {1: 'a', 2: 'b', 3: 'c', 9: '<eos>'}


def decode(ids: list[int]) -> str:
  """Tokens as letters."""
  return ''.join(WORDS[i] for i in ids if i != 9)


def generate(params: int, prompts: Prompts, key: jax.Array) -> Answers:
  """Repeats the prompt's last token `index % 3` times, then stops if that left room for it."""
  del key
  count = prompts.index % 3 + params
  columns = np.arange(3)
  response = np.where(columns < count[:, None], prompts.tokens[:, -1:], 9)
  finished = count < 3
  return Answers(
    Sequences(prompts.tokens, prompts.mask, response, columns <= count[:, None]), finished
  )


def make_batches() -> list[tuple[Prompts, np.ndarray]]:
  """Three prompts in batches of two: the last row of the last batch is a filler."""
  tokens, mask = np.array([[9, 1], [2, 3], [9, 2]]), np.array([[0, 1], [1, 1], [0, 1]], bool)
  rows = [np.array([0, 1]), np.array([2, 0])]
  real = [np.array([True, True]), np.array([True, False])]
  return [
    (Prompts(tokens[r], mask[r], r.astype(np.int32)), keep)
    for r, keep in zip(rows, real, strict=True)
  ]


def gold(prompts: list[str], responses: list[str]) -> np.ndarray:
  """Twice the prompt's length less the response's."""
  return np.array([2.0 * len(p) - len(r) for p, r in zip(prompts, responses, strict=True)])


PROBES = PolicyProbes(
  generate=generate,
  kl=lambda params, sequences: 0.5 * sequences.response_mask.sum(-1),
  proxy=lambda sequences: sequences.response[:, 0] * 1.0,
  reward=lambda answers: answers.sequences.response[:, 0] + 10.0 * answers.finished,
  gold=gold,
  decode=decode,
)
KEY = jax.random.key(0)


def test_every_prompt_is_answered_and_measured_once() -> None:
  """Columns in the order of the prompts, texts from masks, and no row for the filler."""
  answers = answer_prompts(PROBES, 0, KEY, make_batches())
  assert answers['prompt'].tolist() == ['a', 'bc', 'b']
  assert answers['response'].tolist() == ['', 'c', 'bb']
  assert answers['length'].tolist() == [1, 2, 3]
  assert answers['finished'].tolist() == [True, True, True]
  assert answers['kl'].tolist() == [0.5, 1.0, 1.5]
  assert answers['proxy_reward'].tolist() == [9.0, 3.0, 2.0]
  assert answers['reward'].tolist() == [19.0, 13.0, 12.0]
  assert answers['gold_reward'].tolist() == [2.0, 3.0, 0.0]


def test_a_response_without_stop_is_not_finished() -> None:
  """Its text is whole and its length is that of the block."""
  answers = answer_prompts(PROBES, 1, KEY, make_batches())
  assert answers['finished'].tolist() == [True, True, False]
  assert answers['response'].tolist() == ['a', 'cc', 'bbb']
  assert answers['length'].tolist() == [2, 3, 3]


@pytest.mark.parametrize('missing', ['kl', 'proxy', 'reward', 'gold'])
def test_what_has_no_probe_has_no_column(missing: str) -> None:
  """And all other columns are there."""
  columns = {'kl': 'kl', 'proxy': 'proxy_reward', 'reward': 'reward', 'gold': 'gold_reward'}
  changes: dict[str, Any] = {missing: None}
  answers = answer_prompts(PROBES._replace(**changes), 0, KEY, make_batches())
  everything = {'prompt', 'response', 'length', 'finished', *columns.values()}
  assert set(answers) == everything - {columns[missing]}


def test_the_key_reaches_the_sampler_unchanged() -> None:
  """Every batch has the same key, so that a row's sample depends on its number, not its batch."""
  seen: list[Any] = []

  def record(params: int, prompts: Prompts, key: jax.Array) -> Answers:
    seen.append(np.asarray(jax.random.key_data(key)).tolist())
    return generate(params, prompts, key)

  answer_prompts(PROBES._replace(generate=record), 0, KEY, make_batches())
  assert seen == [np.asarray(jax.random.key_data(KEY)).tolist()] * 2


def test_padding_is_never_decoded() -> None:
  """Tokens outside the masks, even ones no tokenizer knows, are not in the texts."""
  sequences = Sequences(
    prompt=np.array([[77, 1, 2]]),
    prompt_mask=np.array([[False, True, True]]),
    response=np.array([[3, 9, 88]]),
    response_mask=np.array([[True, True, False]]),
  )
  assert decode_sequences(sequences, decode) == (['ab'], ['c'])


def test_wins_count_ties_half_and_prefer_the_gold_reward() -> None:
  """The gold reward judges where both have it, else the proxy, else nobody."""
  mine = {'gold_reward': np.array([1.0, 2.0, 3.0]), 'proxy_reward': np.array([0.0, 0.0, 9.0])}
  theirs = {'gold_reward': np.array([2.0, 2.0, 2.0]), 'proxy_reward': np.array([-1.0, 0.0, 1.0])}
  verdicts = wins(mine, theirs)
  assert verdicts is not None and verdicts.tolist() == [0.0, 0.5, 1.0]
  mirrored = wins(theirs, mine)
  assert mirrored is not None and (verdicts + mirrored == 1).all()
  by_proxy = wins({'proxy_reward': mine['proxy_reward']}, theirs)
  assert by_proxy is not None and by_proxy.tolist() == [1.0, 0.5, 1.0]
  by_reward = wins({'reward': mine['proxy_reward']}, {'reward': theirs['proxy_reward']})
  assert by_reward is not None and by_reward.tolist() == [1.0, 0.5, 1.0]
  assert wins({'length': np.ones(3)}, theirs) is None
