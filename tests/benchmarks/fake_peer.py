"""Speaks as a peer does, and does nothing: `fake_peer.py LOG SECONDS [STEPS]`.

It writes a line to LOG at every step, and dies after so many.
"""

import json
import sys


def main() -> None:
  log, seconds, steps = sys.argv[1], float(sys.argv[2]), int((sys.argv[3:] or ['100'])[0])
  loaded = {'loading': 0.5, 'parameters': 7, 'versions': {'trl': '1.2', 'torch': '3.4'}}
  print(json.dumps(loaded), flush=True)
  for number, _ in enumerate(sys.stdin):
    if number == steps:
      sys.exit('\n'.join(f'line {count}' for count in range(100)))
    with open(log, 'a') as file:
      file.write('peer\n')
    print(json.dumps({'step': seconds}), flush=True)


if __name__ == '__main__':
  main()
