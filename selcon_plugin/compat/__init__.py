"""Compatibility patches that let FastReID and torchreid run on current Python and PyTorch.

Both hosts predate current versions of their dependencies. Each patch fixes one fault, and:

* documents what fails without it and when it can be deleted;
* changes nothing on a machine without that fault;
* is idempotent;
* changes only objects in memory, never a file on disk.

Only the adapters (``fastreid_ext``, ``torchreid_ext``), the command line, the tests, and
what imports timm or a user's file need this module; the core is independent of the hosts.
"""

from selcon_plugin.compat.fastreid import FASTREID_INSTALL, prepare_fastreid
from selcon_plugin.compat.shared import (
    HostMissingError,
    HostNeedsError,
    MismatchError,
    prepare_torchvision,
    torchvision_is_patched,
)
from selcon_plugin.compat.torchreid import (
    TORCHREID_INSTALL,
    import_torchreid,
    prepare_torchreid,
)

PREPARATIONS = {"fastreid": prepare_fastreid, "torchreid": prepare_torchreid}

__all__ = [
    "FASTREID_INSTALL",
    "PREPARATIONS",
    "TORCHREID_INSTALL",
    "HostMissingError",
    "HostNeedsError",
    "MismatchError",
    "import_torchreid",
    "prepare_fastreid",
    "prepare_torchreid",
    "prepare_torchvision",
    "torchvision_is_patched",
]
