"""From evaluations to a study's summary, and from a summary to its report."""
