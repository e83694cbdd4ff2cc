"""``python -m cvae_dist``, the same as ``cvae-dist``."""

import sys


def main() -> int:
    """Run one command; return its exit code. Ctrl-C is answered even while modules are imported."""
    try:
        from cvae_dist.cli import main as run

        return run()
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from here"
        if "--json" in sys.argv:
            print(f'{{"event": "error", "kind": "Interrupted", "message": "{message}"}}', flush=True)
        print(f"cvae-dist: {message}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
