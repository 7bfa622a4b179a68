"""The frontier against exact enumeration of a discrete reference, and against other policies."""

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.evaluation import frontier as frontier_lib
from rlhf_jax.evaluation.frontier import FrontierPoint
from rlhf_jax.evaluation.statistics import Interval

PROMPTS, RESPONSES = 12, 30


@pytest.fixture(scope='module')
def task():
  """Reference probabilities and rewards of every response to every prompt, `[P, K]` each."""
  rng = np.random.default_rng(0)
  probabilities = rng.dirichlet(np.ones(RESPONSES), size=PROMPTS)
  rewards = 1.5 * rng.normal(size=(PROMPTS, RESPONSES)) + rng.normal(size=(PROMPTS, 1))
  return probabilities, rewards


def sample(task, count, seed):
  """`[P, count]` rewards of responses drawn from the reference."""
  rng = np.random.default_rng(seed)
  drawn = [rng.choice(r, size=count, p=p) for p, r in zip(*task, strict=True)]
  return np.stack(drawn)


def enumerate_optimum(task, beta):
  """KL and reward of pi* ~ pi_ref exp(r / beta), summed over all responses one by one."""
  kl = reward = 0.0
  for probabilities, rewards in zip(*task, strict=True):
    tilted = [p * np.exp(r / beta) for p, r in zip(probabilities, rewards, strict=True)]
    for p, q, r in zip(probabilities, np.asarray(tilted) / sum(tilted), rewards, strict=True):
      kl += q * np.log(q / p) / PROMPTS
      reward += q * r / PROMPTS
  return kl, reward


def exact_frontier(task):
  kls, rewards = zip(
    *(enumerate_optimum(task, b) for b in np.geomspace(60, 0.05, 120)), strict=True
  )
  return lambda kl: np.interp(np.sqrt(kl), np.sqrt(kls), rewards)


def test_the_estimate_agrees_with_enumeration(task):
  exact = exact_frontier(task)
  points = frontier_lib.optimal_frontier(sample(task, 20000, seed=1), replicates=200)
  assert points[-1].kl > 1.5
  for point in points[1:]:
    assert point.gold_reward.mean == pytest.approx(exact(point.kl), abs=0.03)


def test_the_first_point_is_the_reference(task):
  rewards = sample(task, 50, seed=2)
  first = frontier_lib.optimal_frontier(rewards)[0]
  assert first.kl == 0.0 and first.beta is None
  assert first.gold_reward.mean == pytest.approx(rewards.mean())
  assert first.gold_reward.low < rewards.mean() < first.gold_reward.high


def test_the_exponential_tilt_is_the_best_policy():
  """A general optimiser that knows nothing of the formula finds no better policy at that KL."""
  p, r = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, -1.0, 2.0])
  tilted = p * np.exp(r / 0.8)
  tilted /= tilted.sum()
  budget = float((tilted * np.log(tilted / p)).sum())
  found = optimize.minimize(
    lambda q: -(q * r).sum(),
    np.full(4, 0.25),
    bounds=[(1e-9, 1)] * 4,
    options={'ftol': 1e-12, 'maxiter': 1000},
    constraints=[
      {'type': 'eq', 'fun': lambda q: q.sum() - 1},
      {'type': 'ineq', 'fun': lambda q: budget - (q * np.log(q / p)).sum()},
    ],
  )
  assert -found.fun == pytest.approx((tilted * r).sum(), abs=1e-5)


def test_no_policy_lies_above(task):
  """Random policies, and tilts with a beta for each prompt apart, stay under the estimate."""
  probabilities, rewards = task
  points = frontier_lib.optimal_frontier(sample(task, 20000, seed=3), replicates=200)
  rng = np.random.default_rng(4)
  for _ in range(200):
    beta = rng.uniform(0.7, 4, size=(PROMPTS, 1))
    noise = rng.uniform(0, 1) * rng.normal(size=rewards.shape)
    policy = probabilities * np.exp(rewards / beta + noise)
    policy /= policy.sum(1, keepdims=True)
    kl = float((policy * np.log(policy / probabilities)).sum(1).mean())
    gold = float((policy * rewards).sum(1).mean())
    assert gold < frontier_lib.frontier_at(points, kl).mean + 0.03


def test_the_bias_of_few_samples_is_taken_off(task):
  """With 64 samples a prompt, the mean error over 100 studies is small against the interval."""
  exact = exact_frontier(task)
  errors = []
  for seed in range(100):
    points = frontier_lib.optimal_frontier(sample(task, 64, seed=10 + seed), replicates=2)
    errors.append([frontier_lib.frontier_at(points, kl).mean - exact(kl) for kl in (0.1, 0.4, 0.8)])
  np.testing.assert_allclose(np.mean(errors, 0), 0.0, atol=0.04)


def test_the_curve_ends_before_the_samples_run_out(task):
  """Normal rewards have no best response: KL is cut well under log N, and ESS is what was asked."""
  rewards = 3 * np.random.default_rng(5).normal(size=(20, 512))
  for least in (10.0, 40.0):
    last = frontier_lib.optimal_frontier(rewards, min_effective=least, replicates=20)[-1]
    assert last.kl < np.log(512) - np.log(least) + 1
    assert least <= last.effective_samples < 1.3 * least


def test_the_curve_is_increasing_and_concave_with_beta_its_slope(task):
  points = frontier_lib.optimal_frontier(sample(task, 2000, seed=6), replicates=20)
  kl = np.array([point.kl for point in points])
  gold = np.array([point.gold_reward.mean for point in points])
  slopes = np.diff(gold) / np.diff(kl)
  assert (slopes > 0).all() and (np.diff(slopes) < 1e-9).all()
  for before, point, after in zip(slopes[1:-1], points[2:-1], slopes[2:], strict=True):
    assert after * 0.93 <= point.beta <= before / 0.93


def test_a_flat_reward_has_a_frontier_of_one_point():
  rewards = np.repeat(np.arange(4.0)[:, None], 30, axis=1)
  points = frontier_lib.optimal_frontier(rewards)
  assert [point.kl for point in points] == [0.0]
  assert frontier_lib.frontier_at(points, 3.0).mean == pytest.approx(1.5)


def test_rewards_far_from_zero_do_not_overflow(task):
  rewards = sample(task, 200, seed=7)
  near = frontier_lib.optimal_frontier(rewards, replicates=20)
  far = frontier_lib.optimal_frontier(rewards + 1e6, replicates=20)
  for left, right in zip(near, far, strict=True):
    assert right.kl == pytest.approx(left.kl, rel=1e-3)
    assert right.gold_reward.mean - 1e6 == pytest.approx(left.gold_reward.mean, abs=1e-3)


@pytest.mark.parametrize('bad', [np.zeros(5), np.zeros((1, 5)), np.full((3, 4), np.inf)])
def test_bad_rewards_are_refused(bad):
  with pytest.raises(ValueError, match='rewards'):
    frontier_lib.optimal_frontier(bad)


def line(*ends):
  """A frontier with width 0.1 through the given (KL, reward)."""
  return [FrontierPoint(k, Interval(r, r - 0.1, r + 0.1), None, 50.0) for k, r in ends]


def test_between_points_the_frontier_is_straight_in_the_root_of_kl():
  points = line((0.0, 0.0), (1.0, 2.0), (4.0, 3.0))
  assert frontier_lib.frontier_at(points, 0.25).mean == pytest.approx(1.0)
  assert frontier_lib.frontier_at(points, 2.25).mean == pytest.approx(2.5)
  assert frontier_lib.frontier_at(points, -0.1).mean == pytest.approx(0.0)


def test_past_its_end_the_frontier_is_bounded_by_its_last_slope():
  """On the curve sqrt(KL), the line through the last two points stays above the curve."""
  kls = np.linspace(0, 2, 20) ** 2
  points = line(*zip(kls, np.sqrt(kls), strict=True))
  for kl in (4.5, 9.0, 50.0):
    assert frontier_lib.frontier_at(points, kl).mean > np.sqrt(kl)


def test_a_point_is_above_only_beyond_all_intervals():
  points = line((0.0, 0.0), (1.0, 2.0), (4.0, 3.0))
  at_one = Interval(1.0, 1.0, 1.0)
  assert frontier_lib.above_frontier(at_one, Interval(2.5, 2.2, 2.8), points)
  assert not frontier_lib.above_frontier(at_one, Interval(2.5, 2.0, 3.0), points)
  uncertain = Interval(1.0, 0.0, 4.0)  # it may have spent the KL at which 3.1 can be had
  assert not frontier_lib.above_frontier(uncertain, Interval(2.5, 2.2, 2.8), points)


def test_points_survive_json():
  point = FrontierPoint(1.0, Interval(2.0, 1.5, 2.5), 0.7, 33.0)
  assert FrontierPoint.from_dict(point.to_dict()) == point
