"""Makes the adapters in this folder: tiny random LoRA of PEFT, and what torch says with them.

Set-up as in `make_hf`, and `pip install peft==0.21.2`; then `python -m tests.golden.hf.make_peft`.
Each folder peft_NAME belongs to the checkpoint NAME beside it, and holds the adapter as PEFT saves
it, and expected.npz: logits `[B, T, V]` of that checkpoint's first batch with the adapter.
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


def with_adapter(model: Any, settings: dict[str, Any], seed: int) -> Any:
  """A model with random matrices, both A and B."""
  import peft
  import torch

  config = peft.LoraConfig(task_type='CAUSAL_LM', **settings)
  model = peft.get_peft_model(model, config).eval()
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    if 'lora_' in name:
      parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
  return model


def main() -> None:
  import torch
  import transformers

  for name, settings in ADAPTERS.items():
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
      HERE / name, dtype=torch.float32, attn_implementation='eager'
    ).eval()
    model = with_adapter(base, settings, reference.seed_of(f'peft_{name}'))
    folder = HERE / f'peft_{name}'
    model.save_pretrained(folder)
    (folder / 'README.md').unlink(missing_ok=True)
    path = folder / 'adapter_config.json'
    values = json.loads(path.read_text()) | {'base_model_name_or_path': name}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')
    inputs = np.load(HERE / name / 'expected.npz')
    logits = reference.logits(model, inputs['tokens'][0].astype(np.int64), inputs['mask'][0])
    np.savez_compressed(folder / 'expected.npz', logits=logits.detach().numpy())
    print(f'{folder.name}: {sum(p.stat().st_size for p in folder.iterdir()) / 1024:.0f} KB')


if __name__ == '__main__':
  main()
