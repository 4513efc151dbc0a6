"""Tasks: what a model is asked to predict, and how well it did."""
