"""The files of a report: written whole, made from summary.json alone."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.reporting import markdown, page, schema
from rlhf_jax.common.errors import DataError
from rlhf_jax.common.files import write_text


def write_report(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes summary.json, report.md and report.html into a folder; DataError for a bad summary.

  Each file is replaced at once, so that a reader never sees half of one. The reports are a function
  of the summary alone: the same summary gives the same bytes.
  """
  schema.validate_summary(summary)
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / 'summary.json', json.dumps(summary, indent=1, allow_nan=False) + '\n')
  write_pages(summary, folder)


def write_pages(summary: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Writes report.md and report.html alone."""
  write_text(folder / 'report.md', markdown.render(summary))
  write_text(folder / 'report.html', page.render(summary))


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
