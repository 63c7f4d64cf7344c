"""Checks of a host for both doctors: environment, shared memory, namespaces, GPUs.

Imports no framework.
"""
