"""A checkpoint of transformers through all stages and back into transformers: `make parity`.

  python -m tests.golden.hf.parity_trial

`tests/trial.py` trains it with LoRA on eight simulated devices: SFT, reward model, DPO, PPO. The
exported policies are loaded by transformers, and must write the text that the runs write.
"""

import pathlib
import tempfile
from typing import Any

import jax

from experiments import cli
from tests import trial

jax.config.update('jax_num_cpu_devices', 8)


def main() -> int:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for policy, tokens in trial.run(folder).items():
      expected = texts(folder / f'{policy}_folder', tokens)
      found = texts(folder / f'{policy}_folder', generated(folder / f'{policy}_folder'))
      if found != expected:
        raise AssertionError(f'{policy}: {expected}, in transformers {found}')
      print(f'{policy}: the same greedy text in transformers: {found}')
  return cli.DONE


def generated(folder: pathlib.Path) -> list[list[int]]:
  """What transformers generates greedily after each prompt."""
  import torch
  import transformers

  model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  model.generation_config.eos_token_id = None
  config = transformers.GenerationConfig(
    do_sample=False, max_new_tokens=trial.NEW_TOKENS, pad_token_id=0
  )
  return [
    model.generate(input_ids=torch.tensor([row]), generation_config=config)[0, len(row) :].tolist()
    for row in trial.prompt_ids()
  ]


def texts(folder: pathlib.Path, rows: list[list[int]]) -> list[str]:
  """Token ids as transformers' tokenizer of the folder writes them."""
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  return [str(tokenizer.decode(row)) for row in rows]


if __name__ == '__main__':
  cli.run(main)
