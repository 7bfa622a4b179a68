"""Programs: train one stage, evaluate and sample from a run, compare objectives."""
