"""`python -m bridge_server` is the console script `bridge_server`."""

from bridge_server.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
