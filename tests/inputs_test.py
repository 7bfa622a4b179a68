"""Nothing that is read can run as a program, but for what the user names as one.

Config files and reward functions are programs of the user's own, and are run where this says.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('rlhf_jax', 'experiments', 'configs', 'benchmarks', 'docs')

# What reads objects, and makes them by running what the file says.
MODULES = {
  *(
    'pickle',
    '_pickle',
    'cPickle',
    'dill',
    'cloudpickle',
    'joblib',
    'shelve',
    'marshal',
    'copyreg',
  ),
  *('yaml', 'jsonpickle', 'runpy', 'code', 'codeop', 'torch', 'pandas', 'h5py'),
}
BUILTINS = {'eval', 'exec', 'compile', '__import__'}
METHODS = {
  *('eval', 'exec_module', 'load_module', 'import_module', 'load_source', 'read_pickle'),
  *('system', 'popen', 'extract', 'extractall', 'unpack_archive', 'from_string', 'literal_eval'),
}
# Where a program that the user names is run: a file of Python, or a module of this checkout.
ALLOWED = {
  # Of the peer's environment; it loads the model that the benchmark made.
  'benchmarks/peers/trl_jobs.py': {'torch'},
  'rlhf_jax/config.py': {'exec_module'},
  'rlhf_jax/recipes/rewards.py': {'exec', 'compile'},
  'configs/family.py': {'import_module'},
  'experiments/drilling/clock.py': {'runpy'},
}


def findings(source: str) -> Iterator[str]:
  """What in a program could run what it reads."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (name.name for name in node.names if name.name.partition('.')[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      if (node.module or '').partition('.')[0] in MODULES:
        yield str(node.module)
    elif isinstance(node, ast.Call):
      yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
  function = node.func
  given = {keyword.arg: getattr(keyword.value, 'value', None) for keyword in node.keywords}
  if isinstance(function, ast.Name) and function.id in BUILTINS:
    yield function.id
  if isinstance(function, ast.Attribute):
    owner = ast.unparse(function.value)
    if function.attr in METHODS and owner != 're':
      yield function.attr
    if (
      function.attr == 'load'
      and owner in ('np', 'numpy')
      and given.get('allow_pickle') is not False
    ):
      yield 'np.load'
    remote = given.get(
      'trust_remote_code', None if owner.startswith('Auto') or '.Auto' in owner else 0
    )
    if function.attr == 'from_pretrained' and remote is None:
      yield 'from_pretrained'
  if given.get('trust_remote_code') or given.get('shell') or given.get('allow_pickle'):
    yield 'trust'
  if given.get('weights_only') is False:
    yield 'weights_only'


@pytest.mark.parametrize('folder', FOLDERS)
def test_no_program_is_read_where_data_is(folder: str) -> None:
  for path in sorted((ROOT / folder).rglob('*.py')):
    name = path.relative_to(ROOT).as_posix()
    found = set(findings(path.read_text(encoding='utf-8')))
    assert found == ALLOWED.get(name, set()), name


@pytest.mark.parametrize(
  'program',
  [
    'import pickle',
    'from torch import load',
    'import numpy as np\nnp.load(path)',
    'np.load(path, allow_pickle=True)',
    'numpy.load(path, allow_pickle=allowed)',
    'eval(text)',
    'exec(compile(text, "", "exec"))',
    'transformers.AutoModel.from_pretrained(name)',
    'AutoTokenizer.from_pretrained(name, trust_remote_code=True)',
    'subprocess.run(text, shell=True)',
    'os.system(text)',
    'tarfile.open(path).extractall()',
    'jinja2.Environment().from_string(text)',
    'import yaml',
  ],
)
def test_what_would_be_found(program: str) -> None:
  """The test above could fail."""
  assert list(findings(program))


@pytest.mark.parametrize(
  'program',
  [
    'np.load(path, allow_pickle=False)',
    're.compile(text)',
    'json.load(file)',
    'AutoTokenizer.from_pretrained(name, trust_remote_code=False)',
    'subprocess.run(["git", "status"])',
  ],
)
def test_what_would_not(program: str) -> None:
  assert not list(findings(program))
