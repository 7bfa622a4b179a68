"""Makes report.md and report.html from the summary.json of a study, or makes them again.

  python -m experiments.report --summary=runs/quickstart/summary.json

The reports go beside the summary unless --folder says otherwise. `experiments/compare.py` does the
same at its end; this program is for reports of summaries that are already there.

Exit codes: 0 done, 1 something given is wrong (one message says what).
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.reporting.files import read_summary, write_pages

SUMMARY = flags.DEFINE_string('summary', None, 'The summary.json of a study.', required=True)
FOLDER = flags.DEFINE_string(
  'folder', None, 'Where the reports go; that of the summary if not given.'
)


def main() -> int:
  path = pathlib.Path(SUMMARY.value)
  folder = path.parent if FOLDER.value is None else pathlib.Path(FOLDER.value)
  summary = read_summary(path)
  folder.mkdir(parents=True, exist_ok=True)
  write_pages(summary, folder)
  print(folder / 'report.md')
  print(folder / 'report.html')
  return cli.DONE


if __name__ == '__main__':
  cli.run(main)
