"""The worker: hosts models of one framework and runs them for clients of the other.

See docs/design.md.
"""
