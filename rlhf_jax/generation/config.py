"""How responses are sampled."""

import dataclasses
import math

from rlhf_jax.common.errors import ConfigError
from rlhf_jax.models.config import DTYPES, ModelConfig

WEIGHTS = ('sharded', 'gathered')


@dataclasses.dataclass(kw_only=True)
class GenerationConfig:
  """The sampling distribution and what ends a response."""

  # Logits are divided by it, in the sampler and wherever log-probs of the samples are computed;
  # 0: the likeliest token, always.
  temperature: float = 1.0
  # Only the k likeliest tokens may be drawn (Fan et al. 2018); 0: all.
  top_k: int = 0
  # Only the fewest likeliest tokens that hold this probability may be drawn (Holtzman et al. 2020);
  # 1: all.
  top_p: float = 1.0
  # Whether the tokenizer's end of sequence ends a response, and so the end of turn of its chat
  # template and what its generation config names; False makes responses of a fixed length (Ziegler
  # et al. 2019) unless there are stop tokens.
  stop_at_eos: bool = True
  # Further token ids that end a response; they belong to it.
  stop_tokens: tuple[int, ...] = ()
  # Where weights lie over the mesh's fsdp axis while responses are sampled: 'sharded' as in
  # training, so that every token gathers scanned layers anew; 'gathered' once for all tokens, which
  # takes the memory of all weights in the compute type, divided by the tensor axis.
  weights: str = 'sharded'
  # How many responses are sampled at a time. When an eighth of them have ended, prompts that wait
  # take their places, so that a few long ones do not keep all others waiting. 0: all at once, the
  # best where the memory lasts and lengths differ little.
  slots: int = 0
  # The type of activations and matrix products while responses are sampled; None: the model's own.
  # Log-probs that are learnt from are computed in the model's.
  dtype: str | None = None

  def sampling(self, model: ModelConfig) -> ModelConfig:
    """A decoder as it computes while it samples."""
    return model if self.dtype is None else dataclasses.replace(model, dtype=self.dtype)

  def validate(self, path: str) -> None:
    """Raises ConfigError, naming the field below `path`, for values that cannot work."""
    if not (self.temperature >= 0 and math.isfinite(self.temperature)):
      raise ConfigError(f'{path}.temperature', self.temperature, 'a finite number, 0 or above')
    if self.weights not in WEIGHTS:
      raise ConfigError(f'{path}.weights', self.weights, f'one of {", ".join(WEIGHTS)}')
    if self.slots < 0:
      raise ConfigError(f'{path}.slots', self.slots, 'a number of responses, or 0 for all at once')
    if self.dtype not in (None, *DTYPES):
      raise ConfigError(f'{path}.dtype', self.dtype, f'None or one of {", ".join(DTYPES)}')
    if self.top_k < 0:
      raise ConfigError(f'{path}.top_k', self.top_k, 'a number of tokens, or 0 for all')
    if not 0.0 < self.top_p <= 1.0:
      raise ConfigError(
        f'{path}.top_p', self.top_p, 'a probability above 0 and at most 1 (1: all tokens)'
      )
    if any(token < 0 for token in self.stop_tokens):
      raise ConfigError(f'{path}.stop_tokens', self.stop_tokens, 'token ids, 0 or above')
