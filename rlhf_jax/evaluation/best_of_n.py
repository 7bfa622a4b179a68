"""What is best-of-n sampling worth? Expected values of the response that a judge ranks first."""

import math

import numpy as np

Array = np.ndarray


def best_of_n(judge: Array, values: Array, n: int) -> Array:
  """Expected value of the best of n responses by the judge, for each prompt.

  From N samples, over all subsets of n of them: the sample that the judge ranks i-th from below is
  the best of C(i - 1, n - 1) of the C(N, n) subsets. Unbiased, with less variance than drawing
  subsets (Nakano et al. 2021, appendix I; Gao et al. 2022, section 2).

  Args:
    judge: `[P, N]` float, scores that choose; ties go to the later sample.
    values: `[P, N]` float, what is measured of the chosen one: the same scores, or a gold reward.
    n: in [1, N].

  Returns:
    `[P]` float64.

  Raises:
    ValueError: n is not in [1, N], or the shapes differ.
  """
  judge, values = np.asarray(judge, np.float64), np.asarray(values, np.float64)
  if judge.shape != values.shape or judge.ndim != 2:
    raise ValueError(f'judge {judge.shape} and values {values.shape}: expected [P, N] twice.')
  count = judge.shape[1]
  if not 1 <= n <= count:
    raise ValueError(f'n={n}: expected a number in [1, {count}], the samples of a prompt.')
  order = np.argsort(judge, axis=1, kind='stable')
  weights = np.zeros(count)
  for rank in range(n - 1, count):
    weights[rank] = math.comb(rank, n - 1) / math.comb(count, n)
  return np.take_along_axis(values, order, axis=1) @ weights


def best_of_n_kl(n: int) -> float:
  """log n - (n - 1) / n, in nats: the KL of best-of-n from the policy it samples from.

  Exact if no two responses have equal scores, else an upper bound (Beirami et al. 2024, theorem 1).
  """
  return math.log(n) - (n - 1) / n
