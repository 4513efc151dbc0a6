"""Speed and memory of every position scheme and of other libraries, side by side: `scripts/bench.py`."""
