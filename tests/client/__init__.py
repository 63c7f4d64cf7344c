"""Tests of bridge_client: both framework modules, and the parts that need no framework."""
