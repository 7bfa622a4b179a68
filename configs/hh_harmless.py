"""What the hh_harmless_* stages share: the file of human comparisons, how it is split, the model.

The file is the *test* split of Anthropic's harmless-base comparisons (Bai et al. 2022, "Training a
helpful and harmless assistant"), 2312 dialogues, re-split here: a quarter of the records, chosen by
the SHA-256 of their prompts, is held out and the rest is learnt from. Numbers are therefore not
comparable with those of models that learnt from the original 42,537 training comparisons.

Four of its lines have an empty chosen response; they are set aside into a side file under --root,
not learnt from and not evaluated on (data.on_error='quarantine').
"""

from rlhf_jax.config import EvaluationConfig
from rlhf_jax.data.config import DataConfig
from rlhf_jax.models.config import ModelConfig

SFT = 'configs/hh_harmless_sft.py'
REWARD_MODEL = 'configs/hh_harmless_reward_model.py'


def data() -> DataConfig:
  """A dialogue's last 64 tokens, the response's first 64; byte-level BPE trained in place."""
  return DataConfig(
    source='jsonl',
    path='harmless_base_test.jsonl.gz',
    held_out=0.25,
    on_error='quarantine',
    prompt_length=64,
    response_length=64,
    tokenizer='byte',
    vocab_size=2048,
  )


def model() -> ModelConfig:
  """A Llama-like decoder of 0.42 million parameters."""
  return ModelConfig(width=96, layers=2, heads=4, mlp_width=256, tied_embeddings=True)


def evaluation(every: int = 0) -> EvaluationConfig:
  """All held-out comparisons, and sampled answers to all held-out prompts."""
  return EvaluationConfig(every=every, prompts=1000, records=1000)
