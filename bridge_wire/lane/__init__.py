"""Messages of a lane: frames, sockets, the polled mailbox. Imports no framework."""
