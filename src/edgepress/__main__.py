"""The command `compress`, also as `python -m edgepress`: it listens for signals before it imports what takes time."""

from edgepress.checkpoints import interrupts


def main() -> None:
    interrupts.listen()
    from edgepress.pipeline import cli

    interrupts.end(cli.perform())


if __name__ == "__main__":
    main()
