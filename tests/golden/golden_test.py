"""The fixtures are whole, small, documented, and such that a test can rely on them."""

import re

import numpy as np
import pytest

from tests.golden import golden

README = (golden.HERE / 'README.md').read_text()
LARGEST = 200 * 1024  # Bytes.


def test_readme_lists_every_fixture_and_no_other():
  listed = re.findall(r'^\| `(\w+)` \|', README, re.MULTILINE)
  assert sorted(listed) == golden.names()


def test_every_fixture_has_its_script_or_shares_one():
  scripts = {path.stem for path in golden.HERE.glob('make_*.py')}
  assert scripts == {f'make_{name}' for name in golden.names()}


@pytest.mark.parametrize('name', golden.names())
def test_fixture_says_where_it_comes_from(name):
  about = golden.load(name)['about']
  assert about['reference']
  assert about['function']
  for commit in re.split('; ', about.get('commit', '')):
    assert commit == '' or re.fullmatch('[0-9a-f]{40}', commit)
    assert commit in README
  assert about.get('commit') or about.get('version')
  assert about.get('torch') or 'tensorflow' in about['version']


@pytest.mark.parametrize('name', golden.names())
def test_fixture_is_whole(name):
  fixture = golden.load(name)
  assert (golden.HERE / f'{name}.npz').stat().st_size < LARGEST
  assert name == 'reward' or fixture['inputs']['mask'].dtype == bool  # That has scores alone.
  for array in fixture['inputs'].values():
    # What a test feeds in float32 is then exactly what the reference was fed.
    assert array.dtype in (np.float32, np.int64, bool)
    assert np.all(np.isfinite(array))
  for case in fixture['cases'].values():
    assert case['outputs']
    assert all(np.all(np.isfinite(array)) for array in case['outputs'].values())
    for key, gradient in case['gradients'].items():
      assert np.all(np.isfinite(gradient))
      assert gradient.shape == fixture['inputs'][key].shape
    assert not case['gradients'] or case['outputs']['loss'].shape == ()
  assert any(np.any(g) for case in fixture['cases'].values() for g in case['gradients'].values())


# Of single scores, and of whole segments.
WITHOUT_LENGTHS = ('reward', 'piql')


@pytest.mark.parametrize('name', [name for name in golden.names() if name not in WITHOUT_LENGTHS])
def test_fixture_covers_short_and_full_rows(name):
  mask = golden.load(name)['inputs']['mask']
  lengths = set(mask.sum(-1).ravel().tolist())
  assert mask.shape[-1] in lengths
  assert name == 'openai' or 1 in lengths  # Responses have one length there.


@pytest.mark.parametrize('name', golden.names())
def test_per_row_losses_average_to_the_loss(name):
  for key, case in golden.load(name)['cases'].items():
    outputs = case['outputs']
    if 'losses' in outputs and not case['hyperparameters'].get('bc_coeff'):
      np.testing.assert_allclose(outputs['losses'].mean(), outputs['loss'], rtol=1e-6, err_msg=key)
