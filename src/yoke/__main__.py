"""``python -m yoke`` is the command ``yoke``."""

from yoke.cli.main import main

if __name__ == "__main__":
    main()
