"""``python -m selcon_plugin`` is the command ``selcon``."""

import sys

from selcon_plugin.cli import main

sys.exit(main())
