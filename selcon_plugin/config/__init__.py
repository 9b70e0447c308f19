"""Config: keys, options of a run, the check, loading, help, and the ``Host`` interface.

No host is imported here, and nothing here trains.
"""
