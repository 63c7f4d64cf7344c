"""Tests of bridge_server in the runtimes of both frameworks."""
