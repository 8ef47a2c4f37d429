"""``python -m gridcloud`` is the same as ``gridcloud``."""

from gridcloud.cli.main import main

if __name__ == "__main__":
    main()
