"""What the scripts that make the fixtures share: inputs, a reference's own code, saving.

References are executed where they lie, in a checkout outside this project: a named function, or a
run of statements where the computation has no function of its own. Nothing of them is copied.
"""

import __future__

import argparse
import ast
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
COLUMNS = 7
ROW_LENGTHS = (7, 1, 4, 2, 7, 5, 1, 3)
PAIR_LENGTHS = ((7, 3), (1, 7), (4, 1), (2, 6), (5, 5), (3, 2))


def checkout_argument(description: str | None) -> Path:
  """The one argument of most scripts: where the reference was checked out."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('checkout', type=Path, help='a git checkout of the reference')
  return parser.parse_args().checkout


def commit(checkout: Path) -> str:
  """The commit of a checkout."""
  command = ['git', '-C', str(checkout), 'rev-parse', 'HEAD']
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _run(path: Path, body: Sequence[ast.stmt], scope: dict[str, Any]) -> None:
  # Annotations stay unevaluated: they may name types that need not be there.
  flags = __future__.annotations.compiler_flag
  exec(compile(ast.Module(list(body), []), str(path), 'exec', flags=flags), scope)


def definition(path: Path, name: str, scope: dict[str, Any]) -> Any:
  """Executes one definition of a file, `f`, `C` or `C.f`, without decorators, in `scope`.

  Raises:
    LookupError: the file has no such definition.
  """
  node: Any = ast.parse(path.read_text())
  for part in name.split('.'):
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [n for n in node.body if isinstance(n, kinds) and n.name == part]
    if not found:
      raise LookupError(f'{path}: no definition of {name!r}.')
    node = found[0]
  node.decorator_list = []
  _run(path, [node], scope)
  return scope[node.name]


def statements(path: Path, first: str, last: str, scope: dict[str, Any]) -> None:
  """Executes, in `scope`, the statements of one block from `first` to `last`.

  Args:
    path: the source file.
    first: how the first statement starts, as `ast.unparse` writes it.
    last: how the last one starts; the first match at or after `first` in the same block.
    scope: the names they read; what they assign is added.

  Raises:
    LookupError: no block of the file has such statements.
  """
  for node in ast.walk(ast.parse(path.read_text())):
    for field in ('body', 'orelse'):
      block = getattr(node, field, None)
      texts = [ast.unparse(s) for s in block] if isinstance(block, list) else []
      begins = [i for i, text in enumerate(texts) if text.startswith(first)]
      ends = [i for i, text in enumerate(texts) if begins and text.startswith(last)]
      ends = [i for i in ends if i >= begins[0]]
      if ends:
        assert isinstance(block, list)
        _run(path, block[begins[0] : ends[0] + 1], scope)
        return
  raise LookupError(f'{path}: no block from {first!r} to {last!r}.')


def prefix_mask(lengths: Any, columns: int = COLUMNS) -> np.ndarray:
  """Boolean masks `[..., columns]` that are true for the first `lengths` columns."""
  return np.arange(columns) < np.asarray(lengths)[..., None]


def logprobs(
  rng: np.random.Generator, mask: np.ndarray, *names: str, spread: float = 0.35
) -> dict[str, np.ndarray]:
  """Correlated log-probs for each name; masked positions hold values too, that must not matter."""
  base = -np.exp(rng.normal(-0.3, 0.8, mask.shape))
  return {name: float32(base * np.exp(rng.normal(0, spread, mask.shape))) for name in names}


def float32(array: Any) -> np.ndarray:
  """Rounded to float32, so that a test in float32 starts from the very same inputs."""
  return np.asarray(array, np.float32)


def pair_inputs(seed: int) -> dict[str, np.ndarray]:
  """Comparisons `[B, 2, R]`, the preferred response first."""
  mask = prefix_mask(PAIR_LENGTHS)
  names = ('policy_logprobs', 'ref_logprobs')
  return {'mask': mask, **logprobs(np.random.default_rng(seed), mask, *names)}


def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Inputs as float64 torch tensors that gradients can be asked for; masks and integers as such."""
  import torch

  converted = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
  return {
    name: value.double().requires_grad_() if value.is_floating_point() else value
    for name, value in converted.items()
  }


def binary_logits(logprobs: Any) -> Any:
  """Logits `[..., 2]` of torch under which token 1 has the given log-probs."""
  import torch

  return torch.stack([torch.log(-torch.expm1(logprobs)), logprobs], -1)


def token_batch(prefix: str, mask: Any, prompt: int) -> dict[str, Any]:
  """Ids, attention mask and labels of `prompt` tokens and a response `[B, R]`; pad is token 0."""
  import torch

  attention = torch.nn.functional.pad(mask.long(), (prompt, 0), value=1)
  labels = attention.masked_fill(attention == 0, -100)
  labels[:, :prompt] = -100
  return {
    f'{prefix}input_ids': attention.clone(),
    f'{prefix}attention_mask': attention,
    f'{prefix}labels': labels,
  }


class Fixture:
  """Collects the cases of one file."""

  def __init__(self, name: str, about: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> None:
    self.name = name
    self.about = dict(about)
    self.cases: dict[str, Mapping[str, Any]] = {}
    self.arrays: dict[str, np.ndarray] = {f'inputs/{key}': array for key, array in inputs.items()}

  def add(
    self,
    case: str,
    hyperparameters: Mapping[str, Any],
    outputs: Mapping[str, Any],
    gradients: Mapping[str, Any],
  ) -> None:
    """Adds one case, of arrays or torch tensors.

    Raises:
      ValueError: the case is there already, or one of its numbers is not finite.
    """
    if case in self.cases:
      raise ValueError(f'{self.name}: case {case!r} twice.')
    self.cases[case] = dict(hyperparameters)
    for kind, values in (('outputs', outputs), ('gradients', gradients)):
      for key, value in values.items():
        array = np.asarray(value.detach() if hasattr(value, 'detach') else value)
        if not np.all(np.isfinite(array)):
          raise ValueError(f'{self.name}: {kind}/{case}/{key} is not finite.')
        self.arrays[f'{kind}/{case}/{key}'] = array

  def differentiate(
    self,
    case: str,
    hyperparameters: Mapping[str, Any],
    outputs: Mapping[str, Any],
    leaves: Mapping[str, Any],
  ) -> None:
    """Adds one case with torch's gradients of `outputs['loss']` with respect to `leaves`."""
    import torch

    gradients = torch.autograd.grad(
      outputs['loss'], list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    self.add(case, hyperparameters, outputs, dict(zip(leaves, gradients, strict=True)))

  def save(self) -> None:
    """Writes the file beside this module."""
    about = json.dumps({**self.about, 'cases': self.cases}, indent=1)
    arrays: dict[str, Any] = {'about': np.asarray(about), **self.arrays}
    path = HERE / f'{self.name}.npz'
    np.savez_compressed(path, **arrays)
    print(f'{path}: {len(self.cases)} cases, {path.stat().st_size / 1024:.1f} KB')
