"""Compares fresh random models of every family with torch and transformers: `make parity`.

  python -m tests.golden.hf.parity --draws=3 --seed=0 --write

For each family some settings and weights are drawn (see `cases.py`). transformers saves the model,
the library loads the folder: logits of rows padded left and right, cached decoding, a loss and all
its gradients are compared, in float32. The library exports it again, transformers loads that: its
logits are compared too ('exported'), and 6 tokens that it generates greedily must be the library's.
PEFT puts low-rank matrices that the library wrote onto that model ('adapter'). A reward model goes
the same way ('scores'), its adapter with it. The table holds the largest errors of all draws;
--write puts it into docs/models.md.

Exit codes: 0 all errors are below 1e-4, 1 not, or something given is wrong.
"""

import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from rlhf_jax.common.types import Sequences
from rlhf_jax.data import tokenizers
from rlhf_jax.models import adapters, decoder, hf_export, hf_load, hf_peft, roles
from rlhf_jax.models.adapters import AdapterConfig
from rlhf_jax.models.hf_families import FAMILIES, Family
from tests.golden.hf import cases, reference
from tests.models import hf_golden, hf_parity

DRAWS = flags.DEFINE_integer('draws', 3, 'Models of each family.', 1)
SEED = flags.DEFINE_integer('seed', 0, 'Of settings, weights and tokens.', 0)
WRITE = flags.DEFINE_bool('write', False, 'Put the table into docs/models.md.')

PAGE = pathlib.Path(__file__).resolve().parents[3] / 'docs' / 'models.md'
PART = re.compile(r'(<!-- parity -->\n).*?(<!-- end -->)', re.DOTALL)
LIMIT = 1e-4
GREEDY = 6
COLUMNS = (
  'logits, left', 'logits, right', 'cached', 'loss', 'gradients', 'exported', 'adapter', 'scores'
)  # fmt: skip

Errors = dict[str, float]


def main() -> int:
  import torch
  import transformers

  transformers.utils.logging.set_verbosity_error()
  torch.set_num_threads(2)
  lines = [
    '| family | model_type | ' + ' | '.join(COLUMNS) + ' |',
    '|---|---|' + '---|' * len(COLUMNS),
  ]
  worst = 0.0
  for row, family in enumerate(FAMILIES):
    errors: Errors = dict.fromkeys(COLUMNS, 0.0)
    for number in range(DRAWS.value):
      seed = SEED.value + 100 * row + number
      settings = cases.draw(family.model_type, np.random.default_rng(seed))
      found = compare(family, settings, seed)
      print(
        f'{family.model_type} {number}: worst {max(found.values()):.1e}, {settings}', flush=True
      )
      errors = {name: max(errors[name], found[name]) for name in COLUMNS}
    worst = max(worst, *errors.values())
    numbers = ' | '.join(f'{errors[name]:.0e}' if errors[name] else '0' for name in COLUMNS)
    lines.append(f'| {family.name} | `{family.model_type}` | {numbers} |')
  table = '\n'.join(lines)
  print(table)
  if WRITE.value:
    made = (
      f'Made by `make parity`: {DRAWS.value} draws of each family, seed {SEED.value}, torch '
      f'{torch.__version__.partition("+")[0]}, transformers {transformers.__version__}, '
      f'jax {jax.__version__}.'
    )
    text = PAGE.read_text(encoding='utf-8')
    PAGE.write_text(
      PART.sub(lambda found: f'{found[1]}{table}\n\n{made}\n{found[2]}', text), encoding='utf-8'
    )
  if worst >= LIMIT:
    print(f'an error of {worst:.1e}: expected less than {LIMIT:.0e}')
    return cli.USER_ERROR
  return cli.DONE


def compare(family: Family, settings: dict[str, Any], seed: int) -> Errors:
  """The largest errors of one model, and of a reward model with the same settings."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    words = ' '.join(f'word{number}' for number in range(cases.VOCAB - 4))
    tokenizers.train('word', [words], cases.VOCAB).save(folder / 'tokenizer')
    return compare_policies(family, settings, seed, folder) | compare_scorers(
      family, settings, seed, folder
    )


def compare_policies(
  family: Family, settings: dict[str, Any], seed: int, folder: pathlib.Path
) -> Errors:
  """A language model to the library and back."""
  import torch
  import transformers

  model = reference.make_model(family.model_type, settings, seed)
  reference.save(model, folder / 'theirs')
  tokens, mask = cases.batches(seed)
  expected = {'tokens': tokens.astype(np.int32), 'mask': mask}
  expected |= reference.answers(model, tokens, mask)
  checkpoint = hf_load.open_checkpoint(folder / 'theirs')
  params = hf_load.load_decoder(checkpoint, hf_golden.abstract_decoder(checkpoint.model))
  errors = hf_parity.errors(hf_parity.answers(checkpoint, params, expected), expected)
  # As of a decoder of our own: the config is written from nothing but the ModelConfig.
  hf_export.export_policy(
    folder / 'ours', checkpoint.model, params, hf_export.Assets(folder / 'tokenizer')
  )
  again: Any = transformers.AutoModelForCausalLM.from_pretrained(
    folder / 'ours', dtype=torch.float32, attn_implementation='eager'
  ).eval()
  back = reference.logits(again, tokens[0], mask[0]).detach().numpy()
  errors['exported'] = float(np.abs(back - expected['logits'][0])[mask[0]].max())
  errors['adapter'] = compare_adapters(checkpoint, params, again, folder, tokens[0], mask[0])
  length = cases.COLUMNS - GREEDY
  prompt, real = tokens[0, :, -length:], mask[0, :, -length:]
  again.generation_config.eos_token_id = None  # all rows go on to the end
  theirs = again.generate(
    input_ids=torch.from_numpy(prompt),
    attention_mask=torch.from_numpy(real.astype(np.int64)),
    generation_config=transformers.GenerationConfig(
      do_sample=False, max_new_tokens=GREEDY, pad_token_id=0
    ),
  )[:, length:].numpy()
  ours = greedy(checkpoint.model, params, prompt, real)
  if not np.array_equal(ours, theirs):
    raise AssertionError(f'{family.model_type}, {settings}: greedy {ours} and {theirs}')
  return errors


def compare_adapters(
  checkpoint: hf_load.Checkpoint,
  params: Any,
  theirs: Any,
  folder: pathlib.Path,
  tokens: np.ndarray,
  mask: np.ndarray,
) -> float:
  """Random low-rank matrices of ours, merged by us, and put onto transformers' model by PEFT."""
  import peft

  model = checkpoint.model
  joined = write_adapter(folder / 'adapter', checkpoint, params, None)

  @jax.jit
  def logits(params: Any) -> jax.Array:
    hidden, _ = decoder.hidden_states(
      model, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
    )
    return decoder.logits(model, params, hidden)

  adapted = peft.PeftModel.from_pretrained(theirs, folder / 'adapter').eval()
  expected = reference.logits(adapted, tokens, mask).detach().numpy()
  adapted.unload()
  return float(np.abs(np.asarray(logits(joined)) - expected)[mask].max())


def write_adapter(
  target: pathlib.Path, checkpoint: hf_load.Checkpoint, params: Any, score: hf_load.Score | None
) -> Any:
  """Writes random low-rank matrices for PEFT; the decoder joined with them."""
  model = checkpoint.model
  config = AdapterConfig(
    method='lora', rank=2, alpha=3.0, targets=('query', 'value', 'out', 'down')
  )
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda p: adapters.init(config, model, p, jax.random.key(0)), params)
  trained = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
  target.mkdir()
  hf_peft.export_adapter(
    target, checkpoint.family, model, config, trained, base='somewhere', score=score
  )
  return adapters.join(adapters.frozen_of(config, model, params), trained)


def greedy(model: Any, params: Any, prompt: np.ndarray, real: np.ndarray) -> np.ndarray:
  """`[B, GREEDY]` likeliest tokens after prompts `[B, P]`."""

  @jax.jit
  def step(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    hidden, _ = decoder.hidden_states(model, params, tokens, mask)
    return decoder.logits(model, params, hidden)

  columns = prompt.shape[1] + GREEDY
  tokens = np.zeros((len(prompt), columns), np.int32)
  mask = np.zeros(tokens.shape, bool)
  tokens[:, : prompt.shape[1]], mask[:, : prompt.shape[1]] = prompt, real
  for column in range(prompt.shape[1], columns):
    scores = step(params, jnp.asarray(tokens), jnp.asarray(mask))
    tokens[:, column] = np.asarray(scores[:, column - 1]).argmax(-1)
    mask[:, column] = True
  return tokens[:, prompt.shape[1] :]


def compare_scorers(
  family: Family, settings: dict[str, Any], seed: int, folder: pathlib.Path
) -> Errors:
  """A sequence classifier to the library, given a gain and a bias, and back; with an adapter."""
  import peft
  import torch
  import transformers

  model = reference.make_model(family.model_type, settings, seed, scores=True)
  reference.save(model, folder / 'scorer')
  tokens, mask = cases.batches(seed)
  expected = reference.scores(model, tokens, mask)
  checkpoint = hf_load.open_checkpoint(folder / 'scorer')
  params = hf_load.load_scorer(checkpoint, hf_golden.abstract_scorer(checkpoint.model))
  ours = np.stack([score(checkpoint.model, params, *b) for b in zip(tokens, mask, strict=True)])
  scaled = params | {'normalizer': {'gain': jnp.float32(2.0), 'bias': jnp.float32(-1.0)}}
  hf_export.export_scorer(
    folder / 'scaled', checkpoint.model, scaled, hf_export.Assets(folder / 'tokenizer')
  )
  again: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder / 'scaled', dtype=torch.float32, attn_implementation='eager'
  ).eval()
  back = reference.scores(again, tokens, mask) + again.config.rlhf_jax['score_bias']
  worst = max(np.abs(ours - expected).max(), np.abs(back - (2.0 * expected - 1.0)).max() / 2.0)
  # With low-rank matrices and another head, which PEFT puts in the place of the model's.
  head = params['head'] | {'kernel': params['head']['kernel'][::-1]}
  other = params | {'head': head}
  own = hf_export.score_of(other)
  other['trunk'] = write_adapter(folder / 'scorer_adapter', checkpoint, params['trunk'], own)
  adapted = peft.PeftModel.from_pretrained(again, folder / 'scorer_adapter').eval()
  ours = np.stack([score(checkpoint.model, other, *b) for b in zip(tokens, mask, strict=True)])
  worst = max(worst, np.abs(ours - own.bias - reference.scores(adapted, tokens, mask)).max())
  return {'scores': float(worst)}


def score(model: Any, params: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """`[B]` scores of rows, each cut into a prompt and a response somewhere."""
  rows = jax.tree.map(
    jnp.asarray, Sequences(tokens[:, :4], mask[:, :4], tokens[:, 4:], mask[:, 4:])
  )
  return np.asarray(jax.jit(lambda params: roles.reward_score(model, params, rows))(params))


if __name__ == '__main__':
  cli.run(main)
