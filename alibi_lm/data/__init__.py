"""Text: sources, tokenizers, prepared token streams, training batches and scoring windows."""
