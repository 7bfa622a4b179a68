r"""Makes report.md and report.html from the summary.json of a study, or makes them again.

  python -m experiments.report --summary=runs/quickstart/summary.json

The reports go beside the summary unless --folder says otherwise. `experiments/compare.py` does the
same at its end; this program is for reports of summaries that are already there.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments.reporting import markdown, page, schema
from rlhf_jax.common.errors import DataError, UserError

_SUMMARY = flags.DEFINE_string('summary', None, 'The summary.json of a study.', required=True)
_FOLDER = flags.DEFINE_string(
  'folder', None, 'Where the reports go; that of the summary if not given.'
)


def write_report(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes summary.json, report.md and report.html into a folder; DataError for a bad summary.

  Each file is replaced at once, so that a reader never sees half of one. The reports are a function
  of the summary alone: the same summary gives the same bytes.
  """
  schema.validate_summary(summary)
  folder.mkdir(parents=True, exist_ok=True)
  _replace(folder / 'summary.json', json.dumps(summary, indent=1, allow_nan=False) + '\n')
  write_pages(summary, folder)


def write_pages(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes report.md and report.html alone."""
  _replace(folder / 'report.md', markdown.render(summary))
  _replace(folder / 'report.html', page.render(summary))


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """Reads and checks a summary; DataError names the file and what is wrong with it."""
  try:
    summary = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise DataError(f'{path}: expected the summary.json of a study: {error.strerror}.') from error
  except ValueError as error:
    raise DataError(f'{path}: expected JSON: {error}. Make the study again.') from error
  try:
    schema.validate_summary(summary)
  except DataError as error:
    raise DataError(f'{path}: {error}') from error
  return summary


def _replace(path: pathlib.Path, content: str) -> None:
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(content, encoding='utf-8')
  os.replace(partial, path)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {" ".join(argv[1:])}')
  path = pathlib.Path(_SUMMARY.value)
  folder = path.parent if _FOLDER.value is None else pathlib.Path(_FOLDER.value)
  try:
    summary = read_summary(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_pages(summary, folder)
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(1)
  print(folder / 'report.md')
  print(folder / 'report.html')


if __name__ == '__main__':
  app.run(main)
