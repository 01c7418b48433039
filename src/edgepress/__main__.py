"""`python -m edgepress` is the command `compress`."""

from edgepress.pipeline.cli import main

if __name__ == "__main__":
    main()
