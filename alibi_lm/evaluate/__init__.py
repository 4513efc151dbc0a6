"""From a model and a token stream to scores, curves, views and intervals."""
