"""The worker as a process: its addresses, devices, signals and malloc. Imports no framework."""
