"""The chaos suite: each event, in each phase of a call, over each lane.

`cells` has the table, `victim` the client that events happen to, `scene` the worker, the other
clients and the events themselves.
"""
