"""The data sets by name, in memory or read from a disk; a batch is always (images, targets, index)."""

from dataset.images import Augmentation, ImageData, Images, hold_out
from dataset.loader import Batch, Loader
from dataset.seeds import epoch_seed
from dataset.single import read_normalised
from dataset.sources import DATASETS, load_data
from dataset.stored import StoredImages
from dataset.views import VIEWS

__all__ = [
    "DATASETS",
    "VIEWS",
    "Augmentation",
    "Batch",
    "ImageData",
    "Images",
    "Loader",
    "StoredImages",
    "epoch_seed",
    "hold_out",
    "load_data",
    "read_normalised",
]
