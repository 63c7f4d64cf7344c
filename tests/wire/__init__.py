"""Tests of bridge_wire: the messages, frames, leases and memory of both sides."""
