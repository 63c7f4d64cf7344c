"""Whole stories: attacks, faults, deployment, restarts with other models, migration, the demo."""
