"""The language model: transformer, vocabulary (embedding and output) and initialisation."""
