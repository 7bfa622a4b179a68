"""Times two ways of the same stage in turn, and says how many times faster the second is.

  python -m benchmarks.alternate --way=share_prompts --size=SMALL

Both see the same records; the steps of one are timed between those of the other, so that other work
on the machine slows both; processor time says what is left of that. Each of --repeats passes makes
the same steps, after a first one that compiles.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags

from benchmarks import options
from benchmarks.alternating import WAYS, compare
from experiments import cli

WAY = flags.DEFINE_enum('way', None, list(WAYS), 'What is compared.', required=True)
FOLDER = flags.DEFINE_string(
  'folder', None, 'Keeps data and parents for the next time; default: a temporary one.'
)
JSON = flags.DEFINE_string('json', None, 'A file for the numbers.')


def main() -> int:
  out, size = cli.json_path(JSON.value), options.SIZE.value
  if said := options.skipped():
    print(said)
    return cli.DONE
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(FOLDER.value or temporary)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = compare(WAYS[WAY.value], size, options.dtype(), options.REPEATS.value, folder)
  plain, other = (each['median'] for each in numbers['seconds'])
  faster, less = numbers['faster'], numbers['less_processor_time']
  print(
    f'{WAY.value} {size}: {plain:.3f} s and {other:.3f} s for {numbers["steps"]} steps, '
    f'{faster["median"]:.2f} times faster ({faster["least"]:.2f} to {faster["most"]:.2f}); of '
    f'processor time {less["median"]:.2f} times less ({less["least"]:.2f} to {less["most"]:.2f}); '
    f'load {numbers["load"]:.1f}'
  )
  if out is not None:
    out.write_text(json.dumps(numbers, indent=1) + '\n', encoding='utf-8')
  sys.stdout.flush()
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
