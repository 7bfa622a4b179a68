"""Shape checks name the array that is wrong, and work while tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.common.checks import ShapeError, check_float, check_shapes


def test_sizes_of_axes_are_returned() -> None:
  """Equal letters with equal sizes pass, NumPy arrays too."""
  sizes = check_shapes('a:BR b:B c:B2R', a=jnp.zeros((3, 4)), b=np.zeros(3), c=jnp.zeros((3, 2, 4)))
  assert {name: sizes[name] for name in 'BR'} == {'B': 3, 'R': 4}


@pytest.mark.parametrize(
  ('spec', 'arrays', 'message'),
  [
    ('a:BR b:BR', {'a': np.zeros((2, 3)), 'b': np.zeros((2, 4))}, 'b: axis R has size 4'),
    ('a:BR', {'a': np.zeros(2)}, r'a: expected 2 axes \[B, R\], got shape \(2,\)'),
    ('a:B2', {'a': np.zeros((5, 3))}, 'a: axis 2 has size 3, expected 2'),
    ('a:B', {'a': [1.0, 2.0]}, r'a: expected an array of shape \[B\]'),
  ],
)
def test_the_wrong_array_is_named(spec: str, arrays: dict, message: str) -> None:
  """The message has the array's name, the axis and what was expected."""
  with pytest.raises(ShapeError, match=message):
    check_shapes(spec, **arrays)


def test_checks_happen_while_tracing() -> None:
  """A wrong shape stops compilation; nothing has to run."""
  with pytest.raises(ShapeError, match='b: axis B'):
    jax.eval_shape(
      lambda a, b: check_shapes('a:B b:B', a=a, b=b), jnp.zeros(2), jax.ShapeDtypeStruct((3,), int)
    )


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.bool_, jnp.uint8])
def test_integers_are_refused(dtype: jnp.dtype) -> None:
  """Integer rewards would truncate scores."""
  with pytest.raises(ShapeError, match='rewards: expected a floating-point array'):
    check_float(advantages=jnp.zeros(2), rewards=jnp.zeros(2, dtype))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_floats_pass(dtype: jnp.dtype) -> None:
  """Any floating type is fine."""
  check_float(rewards=jnp.zeros(2, dtype))
