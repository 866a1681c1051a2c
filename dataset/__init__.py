"""The data sets by name. Each is held in memory as bytes; a batch is always (images, targets, index)."""

from dataset.images import Augmentation, ImageData, Images, hold_out
from dataset.loader import Batch, Loader, epoch_seed
from dataset.single import read_normalised
from dataset.sources import DATASETS, load_data
from dataset.views import VIEWS

__all__ = [
    "DATASETS",
    "VIEWS",
    "Augmentation",
    "Batch",
    "ImageData",
    "Images",
    "Loader",
    "epoch_seed",
    "hold_out",
    "load_data",
    "read_normalised",
]
