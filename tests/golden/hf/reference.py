"""What torch and transformers compute: a model with random weights, its logits and gradients."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.hf import cases


def make_model(
  model_type: str, settings: dict[str, Any], seed: int, *, scores: bool = False
) -> Any:
  """A model in float32 in which no weight is at its initial 0 or 1, so that each one shows."""
  import torch
  import transformers

  ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
  config = transformers.AutoConfig.for_model(model_type, **ids, **settings)
  config._attn_implementation = 'eager'
  if scores:
    config.num_labels = 1
  auto: Any = (
    transformers.AutoModelForSequenceClassification
    if scores
    else (transformers.AutoModelForCausalLM)
  )
  model = auto.from_config(config, dtype=torch.float32).eval()
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    # Norms multiply by w, or by 1 + w (Gemma).
    is_scale = parameter.ndim == 1 and name.endswith('weight') and 'gemma' not in model_type
    noise = torch.randn(parameter.shape, generator=generator) * 0.25
    parameter.data.copy_(noise + 1.0 if is_scale else noise)
  return model


def positions(mask: np.ndarray) -> np.ndarray:
  """The position of each token; transformers does not find them from the mask."""
  return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)


def logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> Any:
  """`[B, T, V]` for a batch `[B, T]`."""
  import torch

  return model(
    input_ids=torch.from_numpy(tokens),
    attention_mask=torch.from_numpy(mask.astype(np.int64)),
    position_ids=torch.from_numpy(positions(mask)),
  ).logits


def answers(model: Any, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
  """Logits of both batches, a loss of all of them, and its gradients by the names of parameters.

  The loss is the mean cross-entropy of the next token, over all real tokens with a real successor.
  """
  import torch

  both = [logits(model, *batch) for batch in zip(tokens, mask, strict=True)]
  losses = []
  for scores, row, real in zip(both, torch.from_numpy(tokens), torch.from_numpy(mask), strict=True):
    counted = real[:, :-1] & real[:, 1:]
    losses.append(torch.nn.functional.cross_entropy(scores[:, :-1][counted], row[:, 1:][counted]))
  loss = torch.stack(losses).mean()
  model.zero_grad()
  loss.backward()
  gradients = {
    f'gradient/{name}': parameter.grad.numpy() for name, parameter in model.named_parameters()
  }
  return {
    'logits': np.stack([scores.detach().numpy() for scores in both]),
    'loss': loss.detach().numpy(),
    **gradients,
  }


def scores(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """`[2, B]` scores of a classifier with one label, for both batches."""
  return np.stack(
    [logits(model, *b)[:, 0].detach().numpy() for b in zip(tokens, mask, strict=True)]
  )


def save(model: Any, folder: Path) -> None:
  """Writes config.json and model.safetensors, as transformers does."""
  import transformers

  transformers.utils.logging.disable_progress_bar()
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)


def seed_of(name: str) -> int:
  """A seed of its own for each name."""
  return sum(map(ord, name)) + cases.VOCAB
