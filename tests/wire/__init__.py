"""Tests of bridge_wire: what both sides decode, frame, lease and hand over."""
