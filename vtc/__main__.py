"""`vtc` and `python -m vtc`. Ctrl-C ends both alike, also while the command line is imported."""

import sys


def main() -> int:
    """Run one command; returns its exit code."""
    try:
        from .commands.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("vtc: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
