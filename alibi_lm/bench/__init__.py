"""Speed and memory of every position scheme and of peers, side by side in one process: `scripts/bench.py`."""
