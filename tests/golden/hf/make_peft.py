"""Makes the adapters in this folder: tiny random LoRA of PEFT, and what torch says with them.

Set-up as in `make_hf`, and `pip install peft==0.21.2`; then `python -m tests.golden.hf.make_peft`.
Each folder peft_NAME belongs to the checkpoint NAME beside it, and holds the adapter as PEFT saves
it, and expected.npz: logits `[B, T, V]` of that checkpoint's first batch with the adapter. Those of
reward models (peft_scorer_NAME: a classifier with one label on that checkpoint, which need not be
one) have scores `[2, B]` of both batches.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.hf import reference

HERE = Path(__file__).resolve().parent
# Settings of PEFT's LoraConfig, by the name of the base.
ADAPTERS: dict[str, dict[str, Any]] = {
  'llama3': dict(
    r=2, lora_alpha=6, target_modules=['q_proj', 'v_proj', 'o_proj', 'down_proj'],
    rank_pattern={'o_proj': 3}, alpha_pattern={'o_proj': 5},
  ),
  'gpt2': dict(r=3, lora_alpha=4, target_modules=['c_attn', 'mlp.c_proj'], fan_in_fan_out=True),
  'gpt_neox': dict(
    r=4, lora_alpha=4, target_modules=['query_key_value', 'dense_h_to_4h'], use_rslora=True
  ),
}  # fmt: skip
# The same of reward models; PEFT saves their score without being asked.
SCORERS: dict[str, dict[str, Any]] = {
  'llama3': dict(r=2, lora_alpha=6, target_modules=['q_proj', 'down_proj']),
  'gpt2_scorer': dict(
    r=2, lora_alpha=2, target_modules=['c_attn'], fan_in_fan_out=True, modules_to_save=['score']
  ),
}


def with_adapter(model: Any, task_type: str, settings: dict[str, Any], seed: int) -> Any:
  """A model with random matrices, both A and B, and a random score."""
  import peft
  import torch

  config = peft.LoraConfig(task_type=task_type, **settings)
  model = peft.get_peft_model(model, config).eval()
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    if 'lora_' in name or 'score.modules_to_save' in name:
      parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
  return model


def save(model: Any, folder: Path, base: str, expected: dict[str, np.ndarray]) -> None:
  """Writes an adapter that names its base as it is called here."""
  model.save_pretrained(folder)
  (folder / 'README.md').unlink(missing_ok=True)
  path = folder / 'adapter_config.json'
  values = json.loads(path.read_text()) | {'base_model_name_or_path': base}
  # Sets, in the order of the day.
  values |= {
    key: sorted(values[key]) for key in ('modules_to_save', 'target_modules') if values[key]
  }
  path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')
  np.savez_compressed(folder / 'expected.npz', **expected)  # type: ignore[arg-type]
  print(f'{folder.name}: {sum(p.stat().st_size for p in folder.iterdir()) / 1024:.0f} KB')


def main() -> None:
  import torch
  import transformers

  settings: dict[str, Any] = dict(dtype=torch.float32, attn_implementation='eager')
  for name, adapter in ADAPTERS.items():
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(HERE / name, **settings)
    folder = HERE / f'peft_{name}'
    model = with_adapter(base.eval(), 'CAUSAL_LM', adapter, reference.seed_of(folder.name))
    inputs = np.load(HERE / name / 'expected.npz')
    logits = reference.logits(model, inputs['tokens'][0].astype(np.int64), inputs['mask'][0])
    save(model, folder, name, {'logits': logits.detach().numpy()})
  for name, adapter in SCORERS.items():
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
      HERE / name, num_labels=1, **settings
    )
    folder = HERE / f'peft_scorer_{name}'
    model = with_adapter(base.eval(), 'SEQ_CLS', adapter, reference.seed_of(folder.name))
    inputs = np.load(HERE / name / 'expected.npz')
    scores = reference.scores(model, inputs['tokens'].astype(np.int64), inputs['mask'])
    save(model, folder, name, {'scores': scores})


if __name__ == '__main__':
  main()
