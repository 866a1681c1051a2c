"""WebDataset shards, written by the library itself, show what a folder of the same images shows."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from dataset import Loader, load_data
from errors import UserError
from tests.dataset.image_folders import write_images
from tests.dataset.test_streaming import CPU, same


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


def test_no_share_of_shards_becomes_a_test_split(shards):
    with pytest.raises(UserError, match=r"--split: .* has shards of test images already"):
        load_data("imagenet", str(shards), 32, 0, split=0.2)


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


def add(path, *members: tuple[str, bytes]) -> None:
    """A shard of these members."""
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def image(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def write_both(folder, *members: tuple[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        add(folder / f"{split}-0.tar", *members)
    return folder


PAIR = (("a.jpg", image()), ("a.cls", b"0"), ("b.jpg", image(9)), ("b.cls", b"1"))


def test_a_dot_in_a_key_belongs_to_it(tmp_path):
    members = [pair for k in range(4) for pair in ((f"img.v{k}.jpg", image(k)), (f"img.v{k}.cls", b"1"))]
    data = load_data("imagenet", str(write_both(tmp_path / "shards", *PAIR, *members)), 32, 0)
    assert len(data.train.targets) == 6


def test_members_that_are_not_used_are_counted_and_one_is_named(tmp_path, capsys):
    others = (("a.json", b"{}"), ("a.seg.png", image()), ("c.cls", b"1"), ("README", b"text"))
    data = load_data("imagenet", str(write_both(tmp_path / "shards", *PAIR, *others)), 32, 0)
    assert len(data.train.targets) == 2
    assert "left out 4 members" in (said := capsys.readouterr().out) and "a.json in " in said


def test_a_damaged_header_is_found(tmp_path):
    folder = write_both(tmp_path / "shards", *PAIR)
    content = bytearray((folder / "train-0.tar").read_bytes())
    content[content.index(b"b.jpg")] ^= 1  # the header's checksum is wrong now, and the reader takes it for the end
    (folder / "train-0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"train-0.tar is damaged \d+ bytes"):
        loader_of(folder)
    (folder / "train-0.tar").write_bytes(content[: len(content) // 512 // 2 * 512])
    with pytest.raises(UserError, match=r"train-0.tar"):
        loader_of(folder)


@pytest.mark.parametrize("name", ["train_val.tar", "latest-train-0.tar"])
def test_a_shard_belongs_to_one_split(tmp_path, name):
    folder = write_both(tmp_path / "shards", *PAIR)
    add(folder / name, *PAIR)
    if "val" in name:
        with pytest.raises(UserError, match="training or test images"):
            loader_of(folder)
    else:
        assert (len(loader_of(folder).images.targets), len(loader_of(folder, "test").images.targets)) == (4, 2)


def test_compressed_shards_are_named(tmp_path):
    folder = write_both(tmp_path / "shards", *PAIR)
    (folder / "val-0.tar").rename(folder / "val-0.tar.gz")
    with pytest.raises(UserError, match=r"val-0\.tar\.gz is compressed"):
        loader_of(folder)


def test_a_class_beyond_all_bounds_is_refused(tmp_path):
    folder = write_both(tmp_path / "shards", *PAIR, ("c.jpg", image()), ("c.cls", b"99999999999"))
    with pytest.raises(UserError, match="class 99999999999"):
        loader_of(folder)
