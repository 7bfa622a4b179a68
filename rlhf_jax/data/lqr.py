"""A double integrator with quadratic costs: every function of its maximum-entropy optimum, exactly.

Float64 NumPy throughout. Rewards are in nats: the entropy of the policy counts with weight 1, so
that the optimal advantage is the log-density of the optimal policy (Hejna et al. 2023, section 3.1
with alpha 1; another alpha is another unit of reward).
"""

import dataclasses
import functools
import math

import numpy as np

from rlhf_jax.common.errors import ConfigError

Array = np.ndarray

STATE_SIZE, ACTION_SIZE = 2, 1
LABELS = ('regret', 'return')


@dataclasses.dataclass(kw_only=True)
class LQRConfig:
  """The control problem, and the comparisons made of it; 'embedded:lqr' only."""

  # Comparisons, scored segments and rankings to learn from; the held-out ones (data.held_out) come
  # on top.
  pairs: int = 20_000
  ratings: int = 20_000
  rankings: int = 8_000
  # Segments in a ranking.
  ranking_size: int = 4
  # Steps of a segment.
  horizon: int = 16
  # What is compared: 'regret', the sum of optimal advantages (the model that CPL assumes; within a
  # segment undiscounted, as in its released code), or 'return', the sum of rewards.
  labels: str = 'regret'
  # Nats of difference that make odds of e : 1; 0 is a choice without noise. CPL is exact with
  # alpha = 1 / temperature. Scores have that noise in them: the order of any two of them is a
  # choice by the same odds.
  temperature: float = 1.0
  # Who acts in a segment: a gain of its own, whose mean is the optimal gain times this factor.
  behaviour_gain: float = 0.0
  # Standard deviation of each entry of that gain, as a fraction of the optimal gain's norm. Were it
  # 0, CPL's loss would have a second minimum near the optimal gain mirrored at the behaviour's:
  # comparisons tell how far from the optimum all actions lie far better than to which side.
  behaviour_spread: float = 0.25
  # Standard deviation of the noise on its actions.
  behaviour_std: float = 0.5
  # Standard deviations of a segment's first state.
  position_std: float = 1.0
  velocity_std: float = 1.0
  # Seconds between actions, which are held in between.
  time_step: float = 0.1
  # Discount of rewards and entropies, of the infinite horizon.
  gamma: float = 0.95
  # Costs of squared position and velocity; that of the squared action is 1 of the same unit.
  position_cost: float = 1.0
  velocity_cost: float = 0.5
  # Standard deviation of the optimal policy; it sets the unit of cost. sqrt(1/2) makes its
  # log-density -(mean - a)^2 and a constant, as CPL's released code has it.
  optimal_std: float = math.sqrt(0.5)
  # Seeds the segments and the labels: equal seeds give equal feedback, whatever the run's seed.
  seed: int = 0

  def validate(self, path: str) -> None:
    """Raises ConfigError for values that cannot work."""
    for name in ('pairs', 'ratings', 'rankings', 'horizon'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'an integer >= 1')
    if self.ranking_size < 2:
      raise ConfigError(f'{path}.ranking_size', self.ranking_size, 'an integer >= 2')
    if self.seed < 0:
      raise ConfigError(f'{path}.seed', self.seed, 'an integer >= 0')
    if self.labels not in LABELS:
      raise ConfigError(f'{path}.labels', self.labels, f'one of {LABELS}')
    if not math.isfinite(self.behaviour_gain):
      raise ConfigError(f'{path}.behaviour_gain', self.behaviour_gain, 'a finite number')
    for name in ('temperature', 'behaviour_spread', 'behaviour_std', 'velocity_cost'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number >= 0')
    for name in ('position_std', 'velocity_std', 'time_step', 'position_cost', 'optimal_std'):
      if not 0 < getattr(self, name) < math.inf:
        raise ConfigError(f'{path}.{name}', getattr(self, name), 'a number > 0')
    if self.behaviour_spread == self.behaviour_std == 0:
      raise ConfigError(
        f'{path}.behaviour_std',
        0.0,
        f'a number > 0 with {path}.behaviour_spread=0',
        'A single behaviour without noise cannot tell the optimal gain from its mirror image.',
      )
    if not 0 < self.gamma < 1:
      raise ConfigError(
        f'{path}.gamma', self.gamma, 'a number in (0, 1)', 'The horizon is infinite.'
      )


class LQR:
  """The problem that a config describes, solved.

    s' = A s + B a,   r(s, a) = -(s' Q s + a' R a),   maximise E sum_t gamma^t (r_t + H(pi(.|s_t)))

  With P of the discounted Riccati equation, the curvature M = R + gamma B' P B and the gain
  K = -gamma M^-1 B' P A,

    V(s) = c - s' P s,   A(s, a) = -(a - K s)' M (a - K s) - log Z,   pi(a | s) = N(K s, M^-1 / 2)

  where log Z = (d log pi - log det M) / 2 normalises and c = log Z / (1 - gamma). These satisfy
  Q = r + gamma V(s'), V = log int exp Q da and A = Q - V = log pi (Haarnoja et al. 2017, theorems 1
  and 2).

  Attributes:
    A, B: `[2, 2]`, `[2, 1]` dynamics of position and velocity under an acceleration that is held.
    Q, R: `[2, 2]`, `[1, 1]` costs in nats; gamma: the discount.
    initial: `[2, 2]`, covariance of the first state, whose mean is 0.
    P: `[2, 2]`, optimal cost to go.
    M: `[1, 1]`, curvature of the optimal Q in the action.
    gain: `[1, 2]`, K of the optimal policy.
  """

  def __init__(self, config: LQRConfig):
    from scipy import linalg

    dt = config.time_step
    self.gamma = config.gamma
    self.A = np.array([[1.0, dt], [0.0, 1.0]])
    self.B = np.array([[dt**2 / 2], [dt]])
    self.initial = np.diag([config.position_std**2, config.velocity_std**2])
    # The solution is linear in the unit of cost, which is chosen last.
    Q, R = np.diag([config.position_cost, config.velocity_cost]), np.eye(ACTION_SIZE)
    root = math.sqrt(self.gamma)  # the discounted problem is one with slower dynamics, undiscounted
    P = linalg.solve_discrete_are(root * self.A, root * self.B, Q, R)
    M = R + self.gamma * self.B.T @ P @ self.B
    unit = 1 / (2 * config.optimal_std**2 * M[0, 0])
    self.Q, self.R, self.P, self.M = Q * unit, R * unit, P * unit, M * unit
    self.gain = -self.gamma * np.linalg.solve(self.M, self.B.T @ self.P @ self.A)

  @functools.cached_property
  def log_normalizer(self) -> float:
    """log Z = log int exp(-a' M a) da: the optimal entropy less the expected cost of its noise."""
    return (ACTION_SIZE * math.log(math.pi) - np.linalg.slogdet(self.M)[1]) / 2

  def step(self, states: Array, actions: Array) -> Array:
    """`[..., 2]`, `[..., 1]` -> `[..., 2]`: the next states."""
    return states @ self.A.T + actions @ self.B.T

  def reward(self, states: Array, actions: Array) -> Array:
    """`[..., 2]`, `[..., 1]` -> `[...]`, in nats, without entropy."""
    return -_square(states, self.Q) - _square(actions, self.R)

  def value(self, states: Array) -> Array:
    """`[..., 2]` -> `[...]`: V of the optimum, entropies included."""
    return self.log_normalizer / (1 - self.gamma) - _square(states, self.P)

  def q_value(self, states: Array, actions: Array) -> Array:
    """`[..., 2]`, `[..., 1]` -> `[...]`: Q = r + gamma V(s') of the optimum."""
    return self.reward(states, actions) + self.gamma * self.value(self.step(states, actions))

  def advantage(self, states: Array, actions: Array) -> Array:
    """`[..., 2]`, `[..., 1]` -> `[...]`: Q - V, which is log pi(a | s) of the optimum."""
    return -_square(actions - states @ self.gain.T, self.M) - self.log_normalizer

  def gain_error(self, gain: Array) -> float:
    """||gain - K|| / ||K||, Frobenius; a `[1, 2]` gain acts as `a = gain s`."""
    _check_gain(gain)
    return float(np.linalg.norm(gain - self.gain) / np.linalg.norm(self.gain))

  def cost(self, gain: Array, std: float = 0.0) -> float:
    """Expected discounted cost of a = gain s + noise from a random first state; inf if it diverges.

    With F = A + B gain, X = sum_t gamma^t E[s_t s_t'] solves the Lyapunov equation
    X = initial + gamma (F X F' + std^2 B B' / (1 - gamma)), and the cost is
    tr((Q + gain' R gain) X) + std^2 tr R / (1 - gamma), in nats, without entropy.
    """
    from scipy import linalg

    _check_gain(gain)
    closed = math.sqrt(self.gamma) * (self.A + self.B @ gain)
    if np.abs(np.linalg.eigvals(closed)).max() >= 1:
      return math.inf
    noise = std**2 / (1 - self.gamma)
    source = self.initial + self.gamma * noise * self.B @ self.B.T
    moments = linalg.solve_discrete_lyapunov(closed, source)
    return float(np.trace((self.Q + gain.T @ self.R @ gain) @ moments) + noise * np.trace(self.R))

  @functools.cached_property
  def optimal_cost(self) -> float:
    """The least cost of any policy, tr(P initial): that of the optimal gain without noise."""
    return float(np.trace(self.P @ self.initial))


def _square(x: Array, matrix: Array) -> Array:
  """x' matrix x, `[..., d]` -> `[...]`."""
  return ((x @ matrix) * x).sum(-1)


def _check_gain(gain: Array) -> None:
  if np.shape(gain) != (ACTION_SIZE, STATE_SIZE):
    raise ValueError(f'gain: expected shape {(ACTION_SIZE, STATE_SIZE)}, got {np.shape(gain)}.')
