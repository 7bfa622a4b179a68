"""The switch for the same bits acts before a backend starts, or says that it is too late."""

import os

import pytest

from rlhf_jax.common import determinism
from rlhf_jax.common.errors import RunError


@pytest.fixture(autouse=True)
def no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')


def test_it_adds_its_flag_once_before_a_backend_starts(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(determinism.xla_bridge, 'backends_are_initialized', lambda: False)
  determinism.require()
  determinism.require()
  assert os.environ['XLA_FLAGS'] == f'--xla_a=1 {determinism.FLAG}'
  assert determinism.holds()


@pytest.mark.parametrize(('backend', 'bitwise'), [('cpu', True), ('tpu', True), ('gpu', False)])
def test_afterwards_only_a_gpu_lacks_it(
  backend: str, bitwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(determinism.xla_bridge, 'backends_are_initialized', lambda: True)
  monkeypatch.setattr(determinism.jax, 'default_backend', lambda: backend)
  assert determinism.holds() == bitwise
  if bitwise:
    determinism.require()
  else:
    with pytest.raises(RunError, match='in use already.*XLA_FLAGS.*deterministic=False'):
      determinism.require()
  assert os.environ['XLA_FLAGS'] == '--xla_a=1'
