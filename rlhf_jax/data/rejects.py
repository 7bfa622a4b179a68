"""Bad records of a source: an error that names the first, or a side file with them all."""

import dataclasses
import json
import logging
import os
import pathlib

from rlhf_jax.common import processes
from rlhf_jax.common.errors import DataError
from rlhf_jax.feedback.records import RecordError

SHOWN = 5


@dataclasses.dataclass(frozen=True)
class _Reject:
  source: str
  number: int
  field: str
  reason: str
  raw: str

  @property
  def place(self) -> str:
    return f'{self.source}:{self.number}'


class Rejects:
  """Collects what could not be read; nothing is set aside before `settle` has said so."""

  def __init__(self) -> None:
    self._rejects: list[_Reject] = []
    self._damaged: list[_Reject] = []

  def __len__(self) -> int:
    return len(self._rejects)

  @property
  def damage(self) -> tuple[str, ...]:
    """What is said of sources that are damaged from some line on, which is among the rejects."""
    return tuple(f'{reject.place}: {reject.reason}' for reject in self._damaged)

  def add(
    self, source: str, number: int, error: RecordError, raw: str, *, damage: bool = False
  ) -> None:
    """Notes the `number`-th line or record of `source` (from 1), why it is bad, and its text.

    With `damage` the rest of the source is lost: that is told first.
    """
    reject = _Reject(source, number, error.field, error.reason, raw)
    self._rejects.append(reject)
    if damage:
      self._damaged.append(reject)

  def extend(self, other: 'Rejects') -> None:
    """Notes what another has noted."""
    self._rejects += other._rejects
    self._damaged += other._damaged

  def settle(self, on_error: str, quarantine: pathlib.Path | None) -> int:
    """Raises DataError for the first reject if 'strict', else writes all as JSON lines.

    Args:
      on_error: 'strict' or 'quarantine'.
      quarantine: the side file; needed by 'quarantine', written only if there are rejects.

    Returns:
      How many records were set aside.
    """
    if on_error == 'quarantine' and quarantine is None:
      raise ValueError("on_error='quarantine' needs the path of a side file.")
    if not self._rejects:
      if quarantine is not None and processes.is_main():
        quarantine.unlink(missing_ok=True)  # of the source as it was before it was mended
      return 0
    first = (self._damaged or self._rejects)[0]
    others = [reject for reject in self._rejects if reject is not first]
    if on_error == 'strict':
      more = ''
      if others:
        listed = ', '.join(reject.place.rpartition(':')[2] for reject in others[:SHOWN])
        more = f' {len(others)} more are bad: {listed}{", ..." if len(others) > SHOWN else ""}.'
      field = f'field {first.field!r}: ' if first.field else ''
      raise DataError(
        f'{first.place}: {field}{first.reason}.{more} Mend the source, or set such records aside '
        f"with --config.data.on_error='quarantine'."
      )
    assert quarantine is not None
    if not processes.is_main():
      return len(self._rejects)
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    partial = quarantine.with_name(f'{quarantine.name}.{os.getpid()}')
    with partial.open('w', encoding='utf-8') as file:
      for reject in self._rejects:
        file.write(json.dumps(dataclasses.asdict(reject)) + '\n')
    partial.replace(quarantine)
    logging.warning(
      '%d bad records set aside in %s; the first: %s %s',
      len(self._rejects),
      quarantine,
      first.place,
      first.reason,
    )
    return len(self._rejects)
