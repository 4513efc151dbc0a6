"""python -m benchmarks name=value ..."""

from benchmarks.run import main

if __name__ == "__main__":
    main()
