"""From a model and a token stream to numbers that mean something: scores, curves, views, intervals."""
