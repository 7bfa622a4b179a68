"""The drills by name."""

from collections.abc import Callable

from experiments.drilling import signals, storage
from experiments.drilling.ground import Ground, Outcome

DRILLS: dict[str, Callable[[Ground, int, Outcome], None]] = {
  'kill': signals.kill,
  'kill_saving': signals.kill_saving,
  'terminate': signals.terminate,
  'interrupt_twice': signals.interrupt_twice,
  'damage': storage.damage,
  'full': storage.full,
  'read_only': storage.read_only,
  'clock': signals.clock,
  'process': signals.process,
}
# Drills that mount file systems.
MOUNTING = ('full', 'read_only')
