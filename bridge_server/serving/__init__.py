"""The worker as a server: admission, sessions, lanes, programs, residuals. Imports no framework."""
