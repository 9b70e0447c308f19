"""Workflows of a user in any host: train, adapt, cluster a folder, benchmark.

Neither argparse nor the name of a host belongs here: the hosts come from
``selcon_plugin.hosts``, and the command line from ``cli``.
"""
