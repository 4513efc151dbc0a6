"""Speed and memory of every position scheme and of peers, side by side in one run: `scripts/bench.py`."""
