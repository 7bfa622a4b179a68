"""Metrics that know how to be merged: over microbatches, minibatches, devices and steps."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array


@struct.dataclass
class Mean:
  """A weighted mean as total and weight: merging does not depend on how rows were split."""

  total: Array
  weight: Array

  @classmethod
  def of(cls, values: Array, mask: Array | None = None) -> 'Mean':
    """The mean of `values` where `mask` (same shape, bool or float weights; None: everywhere)."""
    values = values.astype(jnp.float32)
    if mask is None:
      return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
    weights = mask.astype(jnp.float32)
    kept = jnp.where(weights > 0, values, 0.0)  # a masked inf or nan must not leak through 0 * inf
    return cls((kept * weights).sum(), weights.sum())

  def merge(self, other: 'Mean') -> 'Mean':
    return Mean(self.total + other.total, self.weight + other.weight)

  def reduce(self) -> 'Mean':
    """Merges the leading axis away (after a scan)."""
    return Mean(self.total.sum(0), self.weight.sum(0))

  def value(self) -> Array:
    """total / weight, and 0 for an empty mean."""
    return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


@struct.dataclass
class Max:
  """A maximum."""

  extreme: Array

  @classmethod
  def of(cls, values: Array, mask: Array) -> 'Max':
    return cls(jnp.where(mask, values.astype(jnp.float32), -jnp.inf).max())

  def merge(self, other: 'Max') -> 'Max':
    return type(self)(jnp.maximum(self.extreme, other.extreme))

  def reduce(self) -> 'Max':
    return type(self)(self.extreme.max(0))

  def value(self) -> Array:
    return self.extreme


@struct.dataclass
class Min:
  """A minimum."""

  extreme: Array

  @classmethod
  def of(cls, values: Array, mask: Array) -> 'Min':
    return cls(jnp.where(mask, values.astype(jnp.float32), jnp.inf).min())

  def merge(self, other: 'Min') -> 'Min':
    return Min(jnp.minimum(self.extreme, other.extreme))

  def reduce(self) -> 'Min':
    return Min(self.extreme.min(0))

  def value(self) -> Array:
    return self.extreme


@struct.dataclass
class Sum:
  """A count or an amount that adds up, such as tokens processed."""

  amount: Array

  def merge(self, other: 'Sum') -> 'Sum':
    return Sum(self.amount + other.amount)

  def reduce(self) -> 'Sum':
    return Sum(self.amount.sum(0))

  def value(self) -> Array:
    return self.amount


@struct.dataclass
class First:
  """The value at the first of the merged parts, e.g. before the first update of an iteration."""

  initial: Array

  def merge(self, other: 'First') -> 'First':
    del other
    return self

  def reduce(self) -> 'First':
    return First(self.initial[0])

  def value(self) -> Array:
    return self.initial


@struct.dataclass
class FirstMax(Max):
  """A maximum over all microbatches of an iteration's first update; later updates are left out."""


Metric = Mean | Max | Min | Sum | First
Metrics = dict[str, Metric]


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
  """Merges several dictionaries of metrics, name by name."""
  merged: Metrics = {}
  for part in parts:
    for name, metric in part.items():
      merged[name] = merged[name].merge(metric) if name in merged else metric  # type: ignore[arg-type]
  return merged


def reduce(stacked: Mapping[str, Metric]) -> Metrics:
  """Merges the leading axis of every metric away (after a `lax.scan`)."""
  return {name: metric.reduce() for name, metric in stacked.items()}


def over_updates(stacked: Mapping[str, Metric]) -> Metrics:
  """Merges the leading axis, an iteration's updates, of every metric away."""
  return {
    name: FirstMax(metric.extreme[0]) if isinstance(metric, FirstMax) else metric.reduce()
    for name, metric in stacked.items()
  }


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
  """Brings metrics to the host as plain floats, in one transfer."""
  return {
    name: float(value)
    for name, value in jax.device_get(
      {name: metric.value() for name, metric in metrics.items()}
    ).items()
  }


_KINDS = {kind.__name__: kind for kind in (Mean, Max, Min, Sum, First, FirstMax)}


def to_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
  """Metrics, not yet turned into values, as JSON values that `from_json` reads back exactly."""
  return {
    name: {'kind': type(metric).__name__, **{part: x.item() for part, x in vars(metric).items()}}
    for name, metric in jax.device_get(dict(metrics)).items()
  }


def from_json(stored: Mapping[str, Mapping[str, Any]]) -> Metrics:
  """The inverse of `to_json`; floats come back as float32, whole numbers as int32."""

  def array(value: float) -> Any:
    return np.asarray(value, np.int32 if isinstance(value, int) else np.float32)

  return {
    name: _KINDS[parts['kind']](
      **{part: array(value) for part, value in parts.items() if part != 'kind'}
    )
    for name, parts in stored.items()
  }
