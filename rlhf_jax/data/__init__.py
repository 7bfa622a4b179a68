"""Sources of feedback, tokenizers, and pipelines to fixed-shape batches."""
