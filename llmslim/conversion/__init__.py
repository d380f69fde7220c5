"""From a model and a recipe to a checkpoint: in memory, or piece by piece."""
