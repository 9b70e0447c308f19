"""``python -m selcon_plugin`` is the command ``selcon``."""

import sys

from selcon_plugin.cli.main import main

sys.exit(main())
