"""Ready-made configurations; installed as the package ``selcon_plugin.configs``."""
