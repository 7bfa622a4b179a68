r"""Completes prompts, or chats, with the policy of a finished run or a checkpoint folder.

  python -m experiments.sample --run=runs/dpo --prompt="the soup was" --temperature=0
  python -m experiments.sample --run=runs/dpo --prompt=a --prompt=b --num_samples=4 --json=ab.json
  python -m experiments.sample --run=runs/dpo --prompt="the soup was" --best_of=16
  python -m experiments.sample --run=runs/hh_dpo               # a terminal: one line, one prompt
  python -m experiments.sample --run=runs/hh_dpo --chat        # a dialogue, with its history
  python -m experiments.sample --model=hf:owner/name           # or a checkpoint folder

Only the run directory is needed, not the data. Settings that are not given are the run's own; a
--model reads prompts whole and writes up to 128 tokens, as far as its positions go. A
response depends on its prompt's text, its number and --seed, not on the other prompts.

With --chat prompts are what a person says, --system what the assistant is told before; the chat
template of the run's tokenizer writes the dialogue, and where it has none it is a transcript as in
Anthropic's HH, of a Human and an Assistant.

--json writes {"schema": 1, "run" (a folder given as --model too), "checkpoint", "step",
"params_sha256" (of the final parameters), "settings": {"temperature", "top_k", "top_p",
"max_new_tokens", "prompt_length", "seed"},
"samples": [...]}, a sample for each response, in the order of the prompts:
  "prompt"             the text completed          "sample"         its number, 0 to num_samples - 1
  "text"               the response                "finished"       ended by itself, not by length
  "tokens"             its ids, the stop included  "logprobs"       theirs, in nats, unfiltered
  "prompt_tokens"      the ids that were read      "prompt_tokens_cut"  ids that did not fit
  "prompt_tokens_unknown"  how many of them stand for unknown words
  "score"              the reward model's with --best_of, else null

Exit codes: 0 done, 1 something given is wrong (one message says what), 130 ended by Ctrl-C: there
is no state to save.
"""

import dataclasses
import sys
from typing import Any, NamedTuple

import jax
from absl import flags

from experiments import cli, cluster
from rlhf_jax.common import prng, processes
from rlhf_jax.common.errors import ConfigError, RunError, UserError
from rlhf_jax.config import ExperimentConfig
from rlhf_jax.config_parts import CHECKPOINTS
from rlhf_jax.feedback.dataset import Feedback, Split
from rlhf_jax.feedback.dialogues import ASSISTANT, USER, Context, Message
from rlhf_jax.feedback.dialogues import SYSTEM as SYSTEM_ROLE
from rlhf_jax.hf_folder import HfFolder, open_source
from rlhf_jax.objectives import objective_of
from rlhf_jax.recipes.completions import Completer, Completion, best_of, make_completer
from rlhf_jax.recipes.finished import open_run
from rlhf_jax.recipes.parts import Parts
from rlhf_jax.runs import Run, write_json
from rlhf_jax.sharding.mesh import MeshConfig, make_mesh

RUN = flags.DEFINE_string('run', None, 'The directory of a finished run.')
MODEL = flags.DEFINE_string(
  'model', None, "In place of --run: a checkpoint folder of Hugging Face's, or hf:owner/name."
)
PROMPT = flags.DEFINE_multi_string(
  'prompt', [], 'A text to complete; given several times, they are one batch. None: a terminal.'
)
CHAT = flags.DEFINE_bool(
  'chat', False, 'Prompts are what a person says in a dialogue; a terminal keeps its history.'
)
SYSTEM = flags.DEFINE_string('system', None, 'The system message of --chat.')
CHECKPOINT = flags.DEFINE_enum('checkpoint', 'final', CHECKPOINTS, 'Which parameters.')
TEMPERATURE = flags.DEFINE_float(
  'temperature', None, '0: the likeliest token, always. Default: as the run sampled.', 0.0
)
TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k likeliest tokens; 0: all.', 0)
TOP_P = flags.DEFINE_float(
  'top_p', None, 'Draw from the likeliest tokens that hold this probability; 1: all.', 0.0, 1.0
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens',
  None,
  "The longest response. Default: the run's data.response_length; of a --model 128, at most half "
  'of its positions.',
  1,
)
PROMPT_LENGTH = flags.DEFINE_integer(
  'prompt_length',
  None,
  "Tokens of a prompt that are read; longer ones are cut. Default: the run's data.prompt_length; "
  'of a --model all positions that --max_new_tokens leaves.',
  2,
)
SEED = flags.DEFINE_integer('seed', 0, 'Seeds the sampling.', 0, 2**32 - 1)
BEST_OF = flags.DEFINE_integer(
  'best_of',
  1,
  'Best-of-n sampling: of so many responses to each prompt, the one the reward model likes best.',
  1,
)
REWARD_MODEL = flags.DEFINE_string(
  'reward_model',
  None,
  "The judge of --best_of, a run or a checkpoint folder. Default: the run's own reward model.",
)
NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Responses to each prompt.', 1)
JSON = flags.DEFINE_string('json', None, 'A file to write the responses to; needs --prompt.')
FSDP = flags.DEFINE_integer(
  'fsdp',
  1,
  'Parts that parameters are cut into, for models that --tensor alone cannot make fit. So many '
  'devices work, times --tensor; others are idle.',
  1,
)
TENSOR = flags.DEFINE_integer(
  'tensor', 1, "Devices that share the model's matrices; it must divide its heads.", 1
)

_NEW_TOKENS = 128  # of a checkpoint folder
_HUMAN, _ASSISTANT = '\n\nHuman: ', '\n\nAssistant:'


def main() -> int:
  if CHAT.value and NUM_SAMPLES.value > 1 and not PROMPT.value:
    raise UserError(
      f'--num_samples={NUM_SAMPLES.value}: a dialogue goes on from one response. Leave it, or give '
      '--prompt.'
    )
  if BEST_OF.value > 1 and NUM_SAMPLES.value > 1:
    raise UserError(
      f'--num_samples={NUM_SAMPLES.value}: --best_of={BEST_OF.value} shows one response. Leave one.'
    )
  if SYSTEM.value is not None and not CHAT.value:
    raise UserError(f'--system={SYSTEM.value!r}: only a dialogue has one; give --chat.')
  path = cli.json_path(JSON.value)
  if path is not None and not PROMPT.value:
    raise UserError(f'--json={path}: only the responses to --prompt are written; give one.')
  run = cli.run_or_model(RUN.value, MODEL.value)
  config = configure(run)
  if objective_of(config.objective).trains == 'reward_model':
    raise RunError(
      f'{run.source}: a reward model scores responses and cannot write any. Name a run of SFT, '
      'PPO, DPO or CPL; experiments.evaluate says what this one is worth.'
    )
  mesh = mesh_of_flags()
  nothing = Feedback('--prompt', Split(), Split())
  opened = open_run(run, config, nothing, mesh, parents=judges(run), checkpoint=CHECKPOINT.value)
  completer = make_completer(opened, fit=isinstance(run, HfFolder) and PROMPT_LENGTH.value is None)
  assert isinstance(opened.parts, Parts)
  talk = talk_of(opened.parts.tokenizer.template is not None)
  if not PROMPT.value:
    return converse(completer, talk, config)
  asked = [talk.ask(text) if CHAT.value else text for text in PROMPT.value]
  completions = respond(completer, asked, key(0))
  if not processes.is_main():
    return cli.DONE
  for completion in completions:
    show(completion, config)
  if path is not None:
    write_json(path, to_json(run, config, completions))
  return cli.DONE


def mesh_of_flags() -> jax.sharding.Mesh:
  """As many of the devices as flags say; of several processes all."""
  devices, used = jax.devices(), FSDP.value * TENSOR.value
  given = f'--fsdp={FSDP.value} --tensor={TENSOR.value}'
  if used > len(devices):
    raise UserError(f'{given}: there are {len(devices)} devices.')
  if processes.several() and (used < len(devices) or not PROMPT.value):
    raise UserError(
      f'{given}: several processes answer --prompt, on all of their {len(devices)} devices; a '
      'terminal has but one.'
    )
  return make_mesh(MeshConfig(data=1, fsdp=FSDP.value, tensor=TENSOR.value), devices[:used])


def judges(run: Run) -> dict[str, Run]:
  """The reward models of --best_of, by role; none without it."""
  if BEST_OF.value == 1:
    return {}
  if REWARD_MODEL.value is not None:
    judge = open_source(REWARD_MODEL.value)
    if objective_of(judge.config.objective).trains != 'reward_model':
      raise RunError(f'--reward_model={REWARD_MODEL.value}: expected a reward model.')
    return {'reward_model': judge}
  found = {role: parent for role, parent in run.parents().items() if role != 'policy'}
  if not found:
    raise UserError(
      f'--best_of={BEST_OF.value}: {run.source} has no reward model; name one with --reward_model.'
    )
  return found


def respond(completer: Completer, prompts: list[Context], key: jax.Array) -> list[Completion]:
  """Responses to prompts, as many as asked for, or the best of --best_of."""
  if BEST_OF.value > 1:
    return best_of(completer(prompts, key, BEST_OF.value), BEST_OF.value)
  return completer(prompts, key, NUM_SAMPLES.value)


def configure(run: Run) -> ExperimentConfig:
  """The run's config with the settings given by flags."""
  config = run.config
  given = {'temperature': TEMPERATURE.value, 'top_k': TOP_K.value, 'top_p': TOP_P.value}
  lengths = {'response_length': MAX_NEW_TOKENS.value, 'prompt_length': PROMPT_LENGTH.value}
  if isinstance(run, HfFolder):
    lengths = lengths_of(run)
  config = dataclasses.replace(
    config,
    generation=dataclasses.replace(config.generation, **cli.not_none(given)),
    data=dataclasses.replace(config.data, **cli.not_none(lengths)),
  )
  try:
    config.generation.validate('generation')
  except ConfigError as error:
    raise UserError(str(error).replace('--config.generation.', '--')) from error
  return config


def lengths_of(folder: HfFolder) -> dict[str, int | None]:
  """How much a checkpoint folder reads and writes, which no stage has settled."""
  positions, new, read = folder.model.max_length, MAX_NEW_TOKENS.value, PROMPT_LENGTH.value
  if new is None:
    new = max(1, min(_NEW_TOKENS, positions // 2 if read is None else positions - read))
  if read is None:
    read = positions - new
    if read < 2:
      raise UserError(
        f'--max_new_tokens={new}: expected at most {positions - 2}: {folder.source} has '
        f'{positions} positions, and prompts take some. Give less, or say --prompt_length.'
      )
  return {'response_length': new, 'prompt_length': read}


def key(turns: int) -> jax.Array:
  """The sampling key of a batch; in a terminal every turn draws anew."""
  return prng.stream_key(prng.base_key(SEED.value), prng.Stream.SAMPLING, turns)


class Talk(NamedTuple):
  """A dialogue so far, in the form in which the policy reads it.

  Attributes:
    history: the messages, or a transcript for policies without a chat template.
  """

  history: Context

  def ask(self, text: str) -> Context:
    """The dialogue in which a person has just spoken and the assistant is to answer."""
    if isinstance(self.history, str):
      return f'{self.history}{_HUMAN}{text}{_ASSISTANT}'
    return (*self.history, Message(USER, text))


def talk_of(has_template: bool) -> Talk:
  """A dialogue in which nobody has spoken yet."""
  if has_template:
    return Talk(() if SYSTEM.value is None else (Message(SYSTEM_ROLE, SYSTEM.value),))
  return Talk('' if SYSTEM.value is None else SYSTEM.value)


def answered(asked: Context, answer: str) -> Talk:
  """The dialogue after an answer."""
  if isinstance(asked, str):
    # A policy that does not stop may go on to speak for the person.
    return Talk(f'{asked} {answer.partition(_HUMAN.rstrip())[0].strip()}')
  # A template may refuse an empty turn.
  return Talk((*asked, Message(ASSISTANT, answer.strip() or '...')))


def converse(completer: Completer, beginning: Talk, config: ExperimentConfig) -> int:
  """Reads a line, answers, until the input ends."""
  terminal = sys.stdin.isatty()
  if terminal:
    import readline  # noqa: F401  (input() then has line editing and a history)

    commands = '/reset begins anew, ' if CHAT.value else ''
    print(f'{commands}/quit or Ctrl-D ends.')
  talk, turns = beginning, 0
  while True:
    try:
      line = input('> ' if terminal else '')
      if line.strip() == '/quit':
        return cli.DONE
      if CHAT.value and line.strip() == '/reset':
        talk = beginning
        continue
      if not line.strip():
        continue
      prompt = talk.ask(line) if CHAT.value else line
      completions = respond(completer, [prompt], key(turns))
    except (EOFError, KeyboardInterrupt):
      print()
      return cli.DONE
    for completion in completions:
      show(completion, config)
    turns += 1
    talk = answered(prompt, completions[-1].text)


def show(completion: Completion, config: ExperimentConfig) -> None:
  """Prints a response, how it ended, and its token ids."""
  if completion.prompt_tokens_cut:
    begun = 'start' if config.data.truncation == 'keep_start' else 'end'
    print(
      f'note: {completion.prompt_tokens_cut} tokens of the prompt were left out; its {begun} is '
      f'read, {len(completion.prompt_tokens)} tokens (--prompt_length).',
      file=sys.stderr,
    )
  if completion.prompt_tokens_unknown:
    print(
      f'note: {completion.prompt_tokens_unknown} words of the prompt are not in the vocabulary; '
      'they are read as <unk>.',
      file=sys.stderr,
    )
  if PROMPT.value:
    print(f'prompt: {completion.prompt}')
  print(completion.text)
  ended = 'stopped by itself' if completion.finished else 'cut (--max_new_tokens)'
  ids = ' '.join(map(str, completion.tokens))
  print(f'  [{len(completion.tokens)} tokens, {ended}: {ids}]\n', flush=True)


def to_json(run: Run, config: ExperimentConfig, completions: list[Completion]) -> dict[str, Any]:
  """What --json writes; the schema is in the program's description."""
  return {
    'schema': 1,
    'run': str(run.source),
    'checkpoint': CHECKPOINT.value,
    'step': run.step(CHECKPOINT.value),
    'params_sha256': run.params_sha256,
    'settings': {
      'temperature': config.generation.temperature,
      'top_k': config.generation.top_k,
      'top_p': config.generation.top_p,
      'max_new_tokens': config.data.response_length,
      'prompt_length': config.data.prompt_length,
      'seed': SEED.value,
    },
    'samples': [completion._asdict() for completion in completions],
  }


if __name__ == '__main__':
  cli.run(cluster.joined(main))
