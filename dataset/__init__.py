"""The data sets by name, in memory or read from a disk; a batch of any is a `Batch`."""

from dataset.balance import BALANCED, class_weights
from dataset.cache import RowCache, differences
from dataset.changes import POLICIES
from dataset.decoding import Centre, Place, describe_dark
from dataset.identity import data_changes, data_digest, data_identity
from dataset.images import Augmentation, ImageData, Images, hold_out
from dataset.loader import Batch, Loader
from dataset.prediction import describe_preparation, find_images, read_normalised
from dataset.seeds import epoch_seed
from dataset.sources import DATASETS, OF_IMAGE_FILES, dataset_at, load_data
from dataset.streaming import LOOKED_AT, StreamedImages
from dataset.views import VIEWS

__all__ = [
    "BALANCED",
    "DATASETS",
    "LOOKED_AT",
    "OF_IMAGE_FILES",
    "POLICIES",
    "VIEWS",
    "Augmentation",
    "Batch",
    "Centre",
    "ImageData",
    "Images",
    "Loader",
    "Place",
    "RowCache",
    "StreamedImages",
    "class_weights",
    "data_changes",
    "data_digest",
    "data_identity",
    "dataset_at",
    "describe_dark",
    "describe_preparation",
    "differences",
    "epoch_seed",
    "find_images",
    "hold_out",
    "load_data",
    "read_normalised",
]
