"""The optimizer builder, the train step, the loop, checkpoints and metric writers."""
