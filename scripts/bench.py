"""Speed and memory per scheme, backend and length: python scripts/bench.py lengths=[256,1024] peers=false."""

import sys

from alibi_lm.bench.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
