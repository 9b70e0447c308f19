"""Configs of all hosts: keys, checks, loading, help, and the ``Host`` interface.

This folder translates between options and config keys. It imports no host and trains
nothing; the options themselves are defined where they are used.
"""
