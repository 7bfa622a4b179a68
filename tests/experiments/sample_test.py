"""The program that samples from a finished run."""

import json
import shutil
from pathlib import Path

import pytest

from rlhf_jax import stages
from rlhf_jax.data import tokenizers
from rlhf_jax.data.config import DataConfig
from rlhf_jax.feedback.dialogues import to_messages
from tests import tiny
from tests.data import folders
from tests.experiments.programs import message, run_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def greedy(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict]:
  """What a batch of prompts prints, says and writes; the last prompt is too long."""
  out = tmp_path_factory.mktemp('sample') / 'out.json'
  done = run_program(
    'sample',
    f'--run={parents / "sft"}',
    '--prompt=the soup was',
    '--prompt=we',
    '--prompt=we the soup was the soup was',
    '--temperature=0',
    '--max_new_tokens=5',
    f'--json={out}',
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, done.stderr, json.loads(out.read_text())


def test_the_json_has_the_documented_fields(greedy: tuple[str, str, dict], parents: Path) -> None:
  """One sample a prompt in the order given; its ids decode to its text; settings are recorded."""
  _, _, written = greedy
  assert written['schema'] == 1 and written['checkpoint'] == 'final' and written['step'] == 3
  assert (
    written['params_sha256']
    == json.loads((parents / 'sft' / 'result.json').read_text())['params_sha256']
  )
  assert written['settings'] == {
    'temperature': 0.0,
    'top_k': 0,
    'top_p': 1.0,
    'max_new_tokens': 5,
    'prompt_length': 4,
    'seed': 0,
  }
  tokenizer = tokenizers.load(parents / 'sft' / 'tokenizer')
  samples = written['samples']
  assert [row['prompt'] for row in samples] == [
    'the soup was',
    'we',
    'we the soup was the soup was',
  ]
  for row in samples:
    assert tokenizer.decode(row['tokens']) == row['text']
    assert len(row['tokens']) == len(row['logprobs']) <= 5
    assert row['finished'] == (row['tokens'][-1] == tokenizer.eos_id)
    assert row['sample'] == 0


def test_a_model_is_divided_as_flags_say(
  greedy: tuple[str, str, dict], parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Four of eight devices give the tokens of one; more than there are is an error."""
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '8')
  out = tmp_path / 'out.json'
  asked = ('sample', f'--run={parents / "sft"}', '--prompt=the soup was', '--prompt=we')
  given = ('--temperature=0', '--max_new_tokens=5', f'--json={out}')
  done = run_program(*asked, *given, '--fsdp=2', '--tensor=2')
  assert done.returncode == 0, done.stderr
  found = [row['tokens'] for row in json.loads(out.read_text())['samples']]
  assert found == [row['tokens'] for row in greedy[2]['samples'][:2]]
  said = message(run_program(*asked, '--fsdp=8', '--tensor=2'))
  assert '--fsdp=8 --tensor=2: there are 8 devices' in said


def test_text_and_ids_are_printed(greedy: tuple[str, str, dict]) -> None:
  """Every response stands on the terminal with its ids."""
  printed, _, written = greedy
  for row in written['samples']:
    assert row['text'] in printed
    assert ' '.join(map(str, row['tokens'])) in printed


def test_a_long_prompt_is_cut_and_said_so(greedy: tuple[str, str, dict]) -> None:
  """7 words where <bos> and 3 fit: 4 are left out, the end is read, and one note says so."""
  _, said, written = greedy
  assert [row['prompt_tokens_cut'] for row in written['samples']] == [0, 0, 4]
  assert said.count('note: 4 tokens of the prompt were left out') == 1
  # What is left of the long prompt is the first one: equal tokens, equal greedy answer.
  assert written['samples'][2]['prompt_tokens'] == written['samples'][0]['prompt_tokens']
  assert written['samples'][2]['tokens'] == written['samples'][0]['tokens']


def test_a_chat_keeps_its_history(parents: Path) -> None:
  """The second turn's prompt holds the first turn and its answer, whose length is printed."""
  done = run_program(
    'sample', f'--run={parents / "sft"}', '--chat', '--temperature=0', typed='good\ngood\n/quit\n'
  )
  assert done.returncode == 0, done.stderr
  first = int(done.stdout.partition('[')[2].partition(' tokens')[0])
  stopped = 'stopped by itself' in done.stdout.partition(']')[0]
  words = first - stopped  # <eos> is not text
  # 'Human: good Assistant:' is three words, as many as fit; the second turn has three more.
  assert f'note: {3 + words} tokens of the prompt were left out' in done.stderr
  assert done.stdout.count(' tokens, ') == 2


@pytest.fixture(scope='module')
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run on dialogues, with a tokenizer folder that has a chat template."""
  folder = tmp_path_factory.mktemp('chat')
  folders.gpt2(folder / 'tokenizer')
  talk = folders.dialogue('u:Hello', 'a:I am fine.')
  line = json.dumps({'messages': to_messages(talk)})
  (folder / 'data.jsonl').write_text('\n'.join([line] * 8))
  data = DataConfig(
    source='jsonl',
    path=str(folder / 'data.jsonl'),
    tokenizer=str(folder / 'tokenizer'),
    prompt_length=48,
    response_length=8,
    held_out=0.0,
  )
  with tiny.devices(1):
    config = tiny.make_config('sft', steps=2, data=data)
    stages.run_stage(config, folder / 'run', root=folder)
  return folder / 'run'


def test_a_chat_is_written_by_the_template_of_the_run(chat: Path, tmp_path: Path) -> None:
  """The first turn fits; with the answer and the second one, the oldest exchange is left out."""
  flags = (f'--run={chat}', '--chat', '--system=Be brief.', '--temperature=0')
  done = run_program('sample', *flags, '--prompt=Hello', f'--json={tmp_path / "out.json"}')
  assert done.returncode == 0, done.stderr
  (sample,) = json.loads((tmp_path / 'out.json').read_text())['samples']
  tokenizer = tokenizers.load(chat / 'tokenizer')
  asked = folders.dialogue('s:Be brief.', 'u:Hello')
  assert sample['prompt'] == tokenizer.render(asked, ask=True)
  (encoded,) = tokenizer.encode_rendered([sample['prompt']])
  assert sample['prompt_tokens'] == encoded.ids and sample['prompt_tokens_cut'] == 0
  done = run_program('sample', *flags, typed='Hello\nHello\n')
  assert done.returncode == 0, done.stderr
  # What is left of the second turn is the first: equal tokens, equal greedy answer.
  first, second = (part for part in done.stdout.split(']\n\n') if part.strip())
  assert first == second and done.stderr.count('were left out') == 1


def test_a_system_message_needs_a_dialogue(parents: Path) -> None:
  """Without --chat it would be ignored."""
  said = message(run_program('sample', f'--run={parents / "sft"}', '--prompt=x', '--system=y'))
  assert "--system='y'" in said and '--chat' in said


def test_lines_are_completed_until_the_input_ends(parents: Path) -> None:
  """Without --prompt and --chat every line is a prompt of its own."""
  done = run_program('sample', f'--run={parents / "sft"}', typed='the\n\nthe\n')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count(' tokens, ') == 2
  assert 'left out' not in done.stderr


def test_a_reward_model_writes_nothing(parents: Path) -> None:
  """It has no policy: the error says what it is and what to name."""
  said = message(run_program('sample', f'--run={parents / "reward_model"}', '--prompt=x'))
  assert 'a reward model scores responses' in said


def test_an_unfinished_run_is_refused(parents: Path, tmp_path: Path) -> None:
  """A run without result.json may still change."""
  shutil.copytree(parents / 'sft', tmp_path / 'run')
  (tmp_path / 'run' / 'result.json').unlink()
  assert 'not finished' in message(run_program('sample', f'--run={tmp_path / "run"}', '--prompt=x'))


def test_no_run_and_no_place_for_the_json(parents: Path, tmp_path: Path) -> None:
  """Each mistake is told before anything is computed."""
  said = message(run_program('sample', f'--run={tmp_path}', '--prompt=x'))
  assert 'not a run directory' in said
  said = message(
    run_program('sample', f'--run={parents / "sft"}', '--prompt=x', '--json=/nowhere/out.json')
  )
  assert '/nowhere' in said


def test_the_best_of_several_is_the_one_the_judge_scores_highest(
  parents: Path, tmp_path: Path
) -> None:
  """Among the samples that --num_samples shows, its text is one; its score is written."""
  flags = (f'--run={parents / "sft"}', '--prompt=the soup was', '--prompt=we', '--seed=3')
  judge = f'--reward_model={parents / "reward_model"}'
  best, every = tmp_path / 'best.json', tmp_path / 'every.json'
  assert run_program('sample', *flags, '--best_of=4', judge, f'--json={best}').returncode == 0
  assert run_program('sample', *flags, '--num_samples=4', f'--json={every}').returncode == 0
  chosen = json.loads(best.read_text())['samples']
  drawn = json.loads(every.read_text())['samples']
  assert [row['prompt'] for row in chosen] == ['the soup was', 'we']
  for row in chosen:
    same = [other for other in drawn if other['prompt'] == row['prompt']]
    assert same[row['sample']]['tokens'] == row['tokens']
    assert isinstance(row['score'], float) and same[row['sample']]['score'] is None
  said = message(run_program('sample', *flags, '--best_of=4'))
  assert '--best_of=4' in said and '--reward_model' in said
  said = message(run_program('sample', *flags, '--best_of=4', '--num_samples=2', judge))
  assert '--num_samples=2' in said
