"""WebDataset shards, written by the library itself, show what a folder of the same images shows."""

import pytest
import torch
import webdataset

from dataset import Loader, load_data
from errors import UserError
from tests.test_stored_images import CPU, same, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data")


@pytest.fixture
def shards(folder, tmp_path):
    """The same images in the same order, five to a shard."""
    (tmp_path / "shards").mkdir()
    for split, name in (("train", "set-train-%04d.tar"), ("val", "set-validation-%04d.tar")):
        with webdataset.ShardWriter(str(tmp_path / "shards" / name), maxcount=5, verbose=0) as writer:
            for number, path in enumerate(sorted((folder / split).glob("*/*.JPEG"))):
                target = ("cat", "dog").index(path.parent.name)
                writer.write({"__key__": f"{number:06d}", "jpeg": path.read_bytes(), "cls": str(target).encode()})
    return tmp_path / "shards"


def loader_of(path, split: str = "train", workers: int = 0, **options) -> Loader:
    data = load_data("imagenet", str(path), 32, workers)
    return Loader(getattr(data, split), data, 4, CPU, data.augmentation if split == "train" else None, 3, **options)


def test_shards_show_what_a_folder_shows(folder, shards):
    assert len(list(shards.glob("*.tar"))) == 5
    assert same(loader_of(folder).batches(1), loader_of(shards, workers=1).batches(1))
    assert same(loader_of(folder).batches(1, 2), loader_of(shards).batches(1, 2))
    assert same(loader_of(folder, "test").batches(), loader_of(shards, "test").batches())
    assert load_data("imagenet", str(shards), 32, 0).classes == ["0", "1"]


def test_folders_of_shards_are_found_too(shards):
    for split in ("train", "val"):
        (shards / split).mkdir()
        for path in list(shards.glob(f"set-{split}*.tar")):
            path.rename(shards / split / path.name)
    assert len(loader_of(shards).images.targets) == 14


def test_a_shard_that_is_cut_off_or_has_no_classes_is_named(shards):
    path = sorted(shards.glob("set-train*.tar"))[1]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=path.name):
        loader_of(shards)
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "lonely", "jpg": b"x"})
    with pytest.raises(UserError, match=r"lonely .* has no class"):
        loader_of(shards)
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "below", "jpg": b"x", "cls": b"-1"})
    with pytest.raises(UserError, match=r"below .* class -1"):
        loader_of(shards)


def test_a_broken_image_in_a_shard_is_named(shards, capsys):
    with webdataset.TarWriter(str(shards / "set-train-9999.tar")) as writer:
        writer.write({"__key__": "bad", "jpg": b"no image", "cls": b"1"})
    shown = torch.cat([batch.index for batch in loader_of(shards).batches(0)])
    assert 14 not in shown.tolist() and len(shown) == 15
    assert "bad in " in capsys.readouterr().out
