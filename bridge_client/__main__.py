"""`python -m bridge_client` is the console script `bridge_client`."""

from bridge_client.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
