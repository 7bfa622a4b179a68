"""Arrays in, arrays out: log-probs, KL estimators, advantages, attention."""
