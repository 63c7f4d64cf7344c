"""Both frameworks in one process."""
