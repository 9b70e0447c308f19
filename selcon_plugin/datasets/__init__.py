"""Training data without identities: synthetic persons, and folders of person crops."""

from selcon_plugin.datasets.image_folder import ImageItem, read_image_folder
from selcon_plugin.datasets.market_folder import (
    GALLERY_FOLDER,
    QUERY_FOLDER,
    TRAIN_FOLDER,
    MarketSplits,
    read_market_folder,
    read_market_splits,
)
from selcon_plugin.datasets.synthetic.persons import (
    SyntheticPersonsSpec,
    generate_synthetic_persons,
)

__all__ = [
    "GALLERY_FOLDER",
    "QUERY_FOLDER",
    "TRAIN_FOLDER",
    "ImageItem",
    "MarketSplits",
    "SyntheticPersonsSpec",
    "generate_synthetic_persons",
    "read_image_folder",
    "read_market_folder",
    "read_market_splits",
]
