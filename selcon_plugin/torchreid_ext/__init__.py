"""torchreid adapter, which registers data sets and models with torchreid when imported.

* ``ImageSelConEngine``, which replaces ``ImageSoftmaxEngine``;
* data sets ``imagefolderreid`` and ``syntheticpersons``;
* models ``selcon_osnet_x1_0`` and so on, one for each of torchreid's.

It works with the PyPI release (``torchreid.reid``) and the GitHub layout (``torchreid``).
Anything that does not use torchreid's classes belongs to another folder.
"""

from selcon_plugin.compat.torchreid import prepare_torchreid

prepare_torchreid()

from selcon_plugin.models.torchreid import (  # noqa: E402
    TorchreidBackbone,
    create_torchreid_backbone,
    torchreid_model_names,
)
from selcon_plugin.torchreid_ext.datasets import (  # noqa: E402
    register_datasets,
    register_image_folder,
    register_synthetic_persons,
)
from selcon_plugin.torchreid_ext.engine import ImageSelConEngine  # noqa: E402
from selcon_plugin.torchreid_ext.models import (  # noqa: E402
    SelConModel,
    build_selcon_model,
    register_models,
)
from selcon_plugin.torchreid_ext.supervised import refuse_supervised_steps  # noqa: E402
from selcon_plugin.torchreid_ext.weights import guard_host_loaders  # noqa: E402

register_datasets()
register_models()
refuse_supervised_steps()
guard_host_loaders()

__all__ = [
    "ImageSelConEngine",
    "SelConModel",
    "TorchreidBackbone",
    "build_selcon_model",
    "create_torchreid_backbone",
    "register_datasets",
    "register_image_folder",
    "register_models",
    "register_synthetic_persons",
    "torchreid_model_names",
]
