"""Questions asked of a model, answered as numbers with their uncertainty."""
