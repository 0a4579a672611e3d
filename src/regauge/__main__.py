"""``python -m regauge``."""

from regauge.cli import main

if __name__ == "__main__":
    main()
