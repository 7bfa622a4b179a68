"""Metric files: what is written is read back, and a resumed run leaves no row twice."""

import pathlib
import struct

import pytest

from rlhf_jax.common.errors import RunError
from rlhf_jax.training.writers import JsonlWriter, PrefixedWriter, TensorBoardWriter, read_rows


def test_rows_are_readable_at_once(tmp_path: pathlib.Path) -> None:
  """Every row is flushed: a run can be watched, and a kill loses nothing."""
  path = tmp_path / 'metrics.jsonl'
  assert read_rows(path) == []
  writer = JsonlWriter(path, keep_through=-1)
  writer.write(1, {'loss': 0.1, 'tokens': 12})
  assert read_rows(path) == [{'step': 1, 'loss': 0.1, 'tokens': 12}]
  writer.close()


@pytest.mark.parametrize(('keep', 'steps'), [(-1, [9]), (0, [0, 9]), (5, [0, 2, 4, 9])])
def test_rows_beyond_the_checkpoint_are_dropped(
  keep: int, steps: list[int], tmp_path: pathlib.Path
) -> None:
  """Those that will be made again, a line cut short by a kill, and what is no row at all."""
  path = tmp_path / 'metrics.jsonl'
  lines = [f'{{"step": {step}, "loss": 0.5}}' for step in (0, 2, 4, 6)]
  path.write_text('\n'.join([*lines, '[1, 2]', '{"loss": 1}', '{"step": 3, "lo']))
  writer = JsonlWriter(path, keep_through=keep)
  writer.write(9, {})
  writer.close()
  assert [row['step'] for row in read_rows(path)] == steps


def test_a_damaged_row_is_not_lost_in_silence(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A changed bit in the middle: no text any more, or no JSON. Only the last line may be half."""
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xff"}\n{"step"; 3}\n{"step": 4}\n{"ste')
  with pytest.raises(RunError, match='metrics.jsonl:2: damaged'):
    read_rows(path)
  JsonlWriter(path, keep_through=4).close()
  assert [row['step'] for row in read_rows(path)] == [1, 2, 4]
  said = capsys.readouterr().out
  assert said.count('warning: ') == 1 and f'{path}:3: damaged: this row is lost' in said


def events(folder: pathlib.Path) -> list[tuple[str, int, float]]:
  """(tag, step, value) of the scalars in event files, oldest file first, and purges as ''."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.glob('events.*'), key=lambda path: path.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField('session_log'):
        found.append(('', event.step, float(event.session_log.status)))
      found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
  return found


def test_tensorboard_gets_the_numbers_and_hides_what_is_made_again(tmp_path: pathlib.Path) -> None:
  """A resumed writer tells readers to forget steps beyond the checkpoint, and those before stay."""
  writer = TensorBoardWriter(tmp_path, keep_through=-1)
  writer.write(4, {'loss': 0.5, 'note': 'text is left out'})
  writer.sync()  # and then a kill
  assert [event for event in events(tmp_path) if event[0]] == [('loss', 4, 0.5)]
  resumed = TensorBoardWriter(tmp_path, keep_through=3)
  resumed.write(4, {'loss': 0.25})
  resumed.close()
  start = 1.0  # SessionLog.START
  found = events(tmp_path)
  assert found == [('', 0, start), ('loss', 4, 0.5), ('', 4, start), ('loss', 4, 0.25)]
  writer.close()


def test_tensorboard_tells_evaluations_from_training(tmp_path: pathlib.Path) -> None:
  """Both have a 'kl': under one tag they would be drawn as one curve.

  They share a file: what a second one says of steps that are made again would hide rows of the
  first, which readers have read before.
  """
  writer = TensorBoardWriter(tmp_path, keep_through=-1)
  evaluations = PrefixedWriter(writer, 'evaluation/')
  for board in (writer, evaluations):
    board.write(1, {'kl': 0.5})
  writer.close()
  found = [tag for tag, _, _ in events(tmp_path)]
  assert found == ['', 'kl', 'evaluation/kl'] and len(list(tmp_path.iterdir())) == 1


def test_rows_that_are_made_again_are_told_from_others_of_their_step(
  tmp_path: pathlib.Path,
) -> None:
  """Of an evaluation that was left for later, what it said; not what the step itself said."""
  path = tmp_path / 'health.jsonl'
  writer = JsonlWriter(path, keep_through=-1)
  said = [(2, 'evaluation'), (4, 'step'), (4, 'evaluation'), (5, 'step')]
  for step, monitor in said:
    writer.write(step, {'monitor': monitor})
  writer.close()
  stale = lambda row: row['monitor'] == 'evaluation'  # noqa: E731
  JsonlWriter(path, keep_through=4, stale=stale).close()
  assert [(row['step'], row['monitor']) for row in read_rows(path)] == said[:2]
