"""`python -m qvla_export` is the `qvla` command."""

from qvla_export.cli import main

if __name__ == "__main__":
    main()
