"""The subcommands of `bridge_client`. Imports no framework."""
