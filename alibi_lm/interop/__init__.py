"""Conversions: other code's checkpoints as our run folders, and our runs as models of other libraries."""
