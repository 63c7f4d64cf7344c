"""The tests. A package, so that they can share helpers and `python -m tests.fuzz` runs."""
