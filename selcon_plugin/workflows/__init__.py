"""What a user wants done, whatever the host: train, adapt, cluster a folder, benchmark.

No argparse and no name of a host belongs here: hosts come from ``selcon_plugin.hosts``.
"""
