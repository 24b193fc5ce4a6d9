"""The command ``yoke``, also as ``python -m yoke``. Ctrl-C while Python is still reading the program ends it as quietly as later."""

import sys

from yoke.core.errors import INTERRUPTED


def main() -> None:
    """Read the program, and run a command."""
    try:
        from yoke.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
