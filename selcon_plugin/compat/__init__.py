"""Let FastReID and torchreid import and run on current Python and PyTorch.

Both hosts predate what people install today. Each shim below mends one fault, and:

* says what breaks without it and when it can be deleted;
* changes nothing on a machine where that fault is absent;
* may be applied any number of times;
* touches objects in memory only, never a file on disk.

Only the adapters (``fastreid_ext``, ``torchreid_ext``), the command line and the tests
import this module; the core knows nothing of the hosts.
"""

from selcon_plugin.compat.fastreid import FASTREID_INSTALL, prepare_fastreid
from selcon_plugin.compat.shared import (
    HostMissingError,
    prepare_torchvision,
    torchvision_is_patched,
)
from selcon_plugin.compat.torchreid import (
    TORCHREID_INSTALL,
    import_torchreid,
    prepare_torchreid,
)

__all__ = [
    "FASTREID_INSTALL",
    "TORCHREID_INSTALL",
    "HostMissingError",
    "import_torchreid",
    "prepare_fastreid",
    "prepare_torchreid",
    "prepare_torchvision",
    "torchvision_is_patched",
]
