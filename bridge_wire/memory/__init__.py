"""Blocks of shared memory: allocation, slabs, leases, copies, DLPack, CUDA IPC.

Imports no framework.
"""
