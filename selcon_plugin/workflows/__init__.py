"""Complete tasks for any host: train, adapt, cluster a folder, benchmark, demo.

A workflow combines a host from ``selcon_plugin.hosts`` with the rest of the package.
Argument parsing, host-specific code and algorithms do not belong here.
"""
