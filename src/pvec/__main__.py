"""``python -m pvec`` is ``pvec``."""

from pvec.cli.app import main

if __name__ == "__main__":
    main()
