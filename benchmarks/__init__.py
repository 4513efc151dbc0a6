"""Speed and memory of every position scheme and of other libraries, side by side: `python -m benchmarks`."""
