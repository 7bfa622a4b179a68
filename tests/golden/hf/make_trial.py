"""Makes trial_llama: a tiny Llama checkpoint of transformers with a tokenizer of the reviews.

Set-up as in `make_hf`; then `python -m tests.golden.hf.make_trial`. `tests/trial.py` trains it.
"""

from pathlib import Path

from rlhf_jax.data import tokenizers
from rlhf_jax.data.reviews import VOCABULARY
from tests.golden.hf import reference

FOLDER = Path(__file__).resolve().parent / 'trial_llama'


def main() -> None:
  tokenizer = tokenizers.train('word', VOCABULARY, 1000)
  settings = dict(
    vocab_size=tokenizer.vocab_size,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
  )
  reference.save(reference.make_model('llama', settings, seed=0), FOLDER)
  tokenizer.save(FOLDER)


if __name__ == '__main__':
  main()
