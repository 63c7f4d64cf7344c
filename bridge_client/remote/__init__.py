"""Sessions with a worker in another process: link, lanes, spawning. Imports no framework."""
