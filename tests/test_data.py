"""Data: files of the official layout, hostile and broken ones; batches against a plain loop over single pictures."""

import contextlib
import http.server
import io
import os
import pickle
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from halfpass.data import cifar
from halfpass.data import datasets as data
from halfpass.data.batches import batch_count, draw_crop_and_flip, test_batches, train_batches
from halfpass.data.datasets import KNOWN_SHAPES, Dataset, Samples, load
from halfpass.errors import InputError
from halfpass.seed import derive_seed

COUNTS = {"data_batch_1": 4, "data_batch_2": 3, "test_batch": 5}


def message(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- CIFAR: files of the official layout, a few pictures each ---------------------------------------------------------


def python2_pickle(pixels: np.ndarray, labels: list[int], key: str = "labels", dtype: str = "u1") -> bytes:
    """What Python 2 wrote, opcode by opcode: Python 3 cannot write its byte strings."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = pixels.tobytes()
    kind = b"cnumpy\ndtype\n" + text(dtype) + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + text("|") + b"NNN" + integer(-1) * 2 + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
    shape = b"".join(map(integer, pixels.shape)) + b"\x86"
    state = b"(K\x01" + shape + kind + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + text("data") + array + state + text(key) + numbers + b"u."


def pixels_of(name: str) -> np.ndarray:
    return np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (COUNTS[name], 3072), dtype=np.uint8)


def labels_of(name: str) -> list[int]:
    return [(7 * i + ord(name[-1])) % 10 for i in range(COUNTS[name])]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds a small `cifar-10-batches-py`; the table of layouts is told how small."""
    counts = dict(COUNTS)
    small = replace(cifar.CIFAR["cifar10"], test={"test_batch": counts.pop("test_batch")}, train=counts)
    monkeypatch.setitem(cifar.CIFAR, "cifar10", small)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in COUNTS:
        (folder / name).write_bytes(python2_pickle(pixels_of(name), labels_of(name)))
    return tmp_path


@pytest.fixture
def batch(root: Path) -> Path:
    return root / "cifar-10-batches-py" / "data_batch_2"


def archive_of(root: Path, leave_out: str = "") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        evil = tarfile.TarInfo("../../escaped")
        evil.size = 4
        archive.addfile(evil, io.BytesIO(b"evil"))
        for name in reversed(COUNTS):  # the official archive is not in order either
            if name != leave_out:
                archive.add(root / "cifar-10-batches-py" / name, f"cifar-10-batches-py/{name}")
    return content.getvalue()


def is_the_small_cifar(loaded: Dataset) -> bool:
    train = np.concatenate([pixels_of("data_batch_1"), pixels_of("data_batch_2")]).reshape(-1, 3, 32, 32)
    test = pixels_of("test_batch").reshape(-1, 3, 32, 32)
    return (
        np.array_equal(loaded.train.inputs.numpy(), train)
        and np.array_equal(loaded.test.inputs.numpy(), test)
        and loaded.train.labels.tolist() == labels_of("data_batch_1") + labels_of("data_batch_2")
        and loaded.test.labels.tolist() == labels_of("test_batch")
    )


def test_cifar_is_read_from_folder_and_archive_wherever_the_path_points(root: Path) -> None:
    holder = root / "archives"
    holder.mkdir()
    (holder / "cifar-10-python.tar.gz").write_bytes(archive_of(root))
    for path in (root, root / "cifar-10-batches-py", holder, holder / "cifar-10-python.tar.gz"):
        loaded = load("cifar10", str(path))
        assert is_the_small_cifar(loaded), path
        assert loaded.train.inputs.is_contiguous(memory_format=torch.channels_last)
        assert (loaded.train.sample_shape, loaded.classes) == KNOWN_SHAPES["cifar10"]
        assert loaded.crop_padding == 2
    assert sorted(file.name for file in root.iterdir()) == ["archives", "cifar-10-batches-py"]  # nothing was unpacked
    assert not (root.parent / "escaped").exists()
    assert [file.name for file in holder.iterdir()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_written_again_by_python_3_is_read_too(root: Path, batch: Path, protocol: int) -> None:
    labels = [np.int64(label) for label in labels_of("data_batch_2")] if protocol > 2 else labels_of("data_batch_2")
    pixels = np.asfortranarray(pixels_of("data_batch_2"))
    batch.write_bytes(pickle.dumps({"data": pixels, "labels": labels}, protocol))
    assert is_the_small_cifar(load("cifar10", str(root)))


def test_cifar100_reads_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(cifar.CIFAR["cifar100"], train={"train": 4}, test={"test": 5})
    monkeypatch.setitem(cifar.CIFAR, "cifar100", small)
    for name, like in (("train", "data_batch_1"), ("test", "test_batch")):
        labels = [90 + label for label in labels_of(like)]
        (tmp_path / name).write_bytes(python2_pickle(pixels_of(like), labels, "fine_labels"))
    loaded = load("cifar100", str(tmp_path))
    assert (loaded.train.sample_shape, loaded.classes) == KNOWN_SHAPES["cifar100"] == ((3, 32, 32), 100)
    assert loaded.test.labels.tolist() == [90 + label for label in labels_of("test_batch")]


def test_the_official_counts_are_asked_for(tmp_path: Path) -> None:
    for name in ("cifar10", "cifar100"):
        layout = cifar.CIFAR[name]
        assert (sum(layout.train.values()), sum(layout.test.values())) == (50_000, 10_000)
    (tmp_path / "data_batch_1").write_bytes(python2_pickle(pixels_of("data_batch_1"), labels_of("data_batch_1")))
    assert message(lambda: load("cifar10", str(tmp_path))) == (
        f"{tmp_path}/data_batch_1, 'data': expected shape (10000, 3072), found (4, 3072); "
        "get the official archive again"
    )


# --- CIFAR: hostile and broken files ----------------------------------------------------------------------------------


class Evil:
    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_refused_unrun(root: Path, batch: Path, protocol: int) -> None:
    good, marker = batch.read_bytes(), root / "ran"
    batch.write_bytes(pickle.dumps({"data": Evil(marker), "labels": []}, protocol))
    assert message(lambda: load("cifar10", str(root))) == (
        f"{batch}: expected a pickle of arrays, lists, strings and numbers, found one that names {os.name}.system; "
        "do not trust this file; get the official archive"
    )
    assert not marker.exists()
    batch.write_bytes(good)
    assert is_the_small_cifar(load("cifar10", str(root)))


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "numpy ndarray.tofile", "numpy.core.multiarray fromfile"]
)
def test_names_near_the_allowed_ones_are_refused(root: Path, batch: Path, name: str) -> None:
    module, function = name.split()
    batch.write_bytes(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"U\x01x\x85R.")
    assert f"{batch}: expected a pickle of arrays" in (said := message(lambda: load("cifar10", str(root))))
    assert f"found one that names {module}.{function};" in said


def test_allowed_names_run_nothing_real(root: Path, batch: Path) -> None:
    huge = b"cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85\x85R"  # ndarray((2**40,)) would take a TiB
    batch.write_bytes(b"\x80\x02}(U\x04data" + huge + b"U\x06labels]u.")
    assert message(lambda: load("cifar10", str(root))) == (
        f"{batch}, 'data': expected an array of uint8, found no array; get the official archive again"
    )
    batch.write_bytes(python2_pickle(pixels_of("data_batch_2"), labels_of("data_batch_2"), dtype="O8"))
    assert message(lambda: load("cifar10", str(root))) == (
        f"{batch}, 'data': expected an array of uint8, found an array of type 'O8'; get the official archive again"
    )


@pytest.mark.parametrize("kept", [0, 1, 2, 30, 150, 5000, -1])
def test_a_truncated_file_is_refused(root: Path, batch: Path, kept: int) -> None:
    batch.write_bytes(batch.read_bytes()[:kept])
    said = message(lambda: load("cifar10", str(root)))
    assert said.startswith(f"{batch}: expected a whole pickle, found a truncated or corrupted one (")
    assert said.endswith("; get the official archive again")


def test_no_flipped_byte_gives_anything_but_data_or_a_clear_error(root: Path, batch: Path) -> None:
    good, draws = batch.read_bytes(), np.random.default_rng(0)
    places = [*range(190), *draws.integers(190, len(good), 50), *range(len(good) - 50, len(good))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= int(draws.integers(1, 256))
        batch.write_bytes(bad)
        with contextlib.suppress(InputError):  # any other error fails the test
            load("cifar10", str(root))


BAD_CONTENT = {
    "'data': expected shape (3, 3072), found (2, 3072)": {"data": pixels_of("data_batch_2")[:2], "labels": [1, 2, 3]},
    "'data': expected an array of uint8, found an array of type 'f4'": {
        "data": np.zeros((3, 3072), np.float32), "labels": [1, 2, 3]
    },
    "'data': expected an array of uint8, found list": {"data": [1, 2], "labels": [1, 2, 3]},
    "'labels': expected a list of 3 labels, found a list of 2": {"data": pixels_of("data_batch_2"), "labels": [1, 2]},
    "'labels': expected a list of 3 labels, found int": {"data": pixels_of("data_batch_2"), "labels": 3},
    "'labels', label 2: expected a whole number in 0..9, found 10": {
        "data": pixels_of("data_batch_2"), "labels": [0, 9, 10]
    },
    "'labels', label 0: expected a whole number in 0..9, found -1": {
        "data": pixels_of("data_batch_2"), "labels": [-1, 9, 1]
    },
    "'labels', label 1: expected a whole number in 0..9, found float": {
        "data": pixels_of("data_batch_2"), "labels": [0, 1.0, 2]
    },
}


@pytest.mark.parametrize("said", BAD_CONTENT)
def test_content_of_another_kind_is_refused(root: Path, batch: Path, said: str) -> None:
    batch.write_bytes(pickle.dumps(BAD_CONTENT[said], 2))
    assert message(lambda: load("cifar10", str(root))) == f"{batch}, {said}; get the official archive again"


def test_pickles_of_other_things_are_refused(root: Path, batch: Path) -> None:
    batch.write_bytes(pickle.dumps([1, 2], 2))
    assert f"{batch}: expected a pickled dict, found list;" in message(lambda: load("cifar10", str(root)))
    batch.write_bytes(pickle.dumps({"data": 1, "coarse_labels": []}, 2))
    said = message(lambda: load("cifar10", str(root)))
    assert f"{batch}: expected an entry 'labels', found only 'data', 'coarse_labels';" in said


def test_missing_files_and_folders_are_named(root: Path, batch: Path) -> None:
    batch.unlink()
    assert message(lambda: load("cifar10", str(root))) == (
        f"{batch.parent}: expected data_batch_2 in it, found no such file; get the official archive again"
    )
    both = "cifar-10-batches-py or cifar-10-python.tar.gz"
    remedy = "give the folder that holds it, or let it be downloaded"
    (root / "empty").mkdir()
    for name, found in (("gone", "no such file or folder"), ("empty", "neither")):
        said = message(partial(load, "cifar10", str(root / name)))
        assert said == f"{root / name}: expected {both}, found {found}; {remedy}"
    assert message(lambda: load("cifar10")) == (
        f"data.path: expected the place of {both}, found none; give the folder that holds it"
    )


@pytest.mark.parametrize("kept", [0, 5, 0.3, 0.9])
def test_a_truncated_archive_is_refused(root: Path, kept: float) -> None:
    whole, archive = archive_of(root), root / "cifar-10-python.tar.gz"
    archive.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    said = message(lambda: load("cifar10", str(archive)))
    assert said.startswith(f"{archive}: expected a whole .tar.gz archive, found a truncated or corrupted one (")
    archive.write_bytes(whole)
    assert is_the_small_cifar(load("cifar10", str(archive)))


def test_archives_of_other_things_are_refused(root: Path, batch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = root / "cifar-10-python.tar.gz"
    archive.write_bytes(archive_of(root, leave_out="test_batch"))
    said = message(lambda: load("cifar10", str(archive)))
    assert said == f"{archive}: expected test_batch in it, found no such file; get the official archive again"
    monkeypatch.setattr(cifar, "MAX_FILE_BYTES", 100)
    said = message(lambda: load("cifar10", str(archive)))
    place = f"{archive}, cifar-10-batches-py/data_batch_2"
    assert f"{place}: expected at most 100 bytes, found {batch.stat().st_size};" in said
    assert "data_batch_1: expected at most 100 bytes" in message(lambda: load("cifar10", str(root)))


# --- CIFAR: the download ----------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder on loopback and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Offers the small archive; the table of layouts holds its sum."""
    (root / "served").mkdir()
    archive = root / "served" / "cifar-10-python.tar.gz"
    archive.write_bytes(archive_of(root))
    monkeypatch.setitem(cifar.CIFAR, "cifar10", replace(cifar.CIFAR["cifar10"], archive_md5=cifar._md5(archive)))
    with Server(root / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HALFPASS_CIFAR_URL", server.url)
        monkeypatch.setenv("no_proxy", "*")
        yield server
        server.shutdown()
        thread.join(5)


def test_the_archive_is_fetched_once(root: Path, server: Server) -> None:
    into = root / "new" / "folder"
    for _ in range(2):
        assert is_the_small_cifar(load("cifar10", str(into), download=True))
    assert [file.name for file in into.iterdir()] == ["cifar-10-python.tar.gz"]
    load("cifar10", str(root), download=True)  # the folder is there already
    assert len(server.asked) == 1
    (into / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    assert is_the_small_cifar(load("cifar10", str(into), download=True))
    assert len(server.asked) == 2


def test_an_archive_with_a_wrong_sum_is_not_kept(root: Path, server: Server) -> None:
    good, into = cifar.CIFAR["cifar10"], root / "into"
    cifar.CIFAR["cifar10"] = replace(good, archive_md5="0" * 32)
    assert message(lambda: load("cifar10", str(into), download=True)) == (
        f"{server.url}/cifar-10-python.tar.gz: expected an archive with md5 {'0' * 32}, "
        f"found md5 {good.archive_md5}; try it again"
    )
    assert list(into.iterdir()) == []
    cifar.CIFAR["cifar10"] = good
    assert is_the_small_cifar(load("cifar10", str(into), download=True))


def test_a_download_that_fails_leaves_nothing(root: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    into = root / "into"
    (root / "served" / "cifar-10-python.tar.gz").unlink()
    for address, found in ((server.url, "HTTPError"), ("http://127.0.0.1:9", "URLError"), ("nonsense", "ValueError")):
        monkeypatch.setenv("HALFPASS_CIFAR_URL", address)
        said = message(lambda: load("cifar10", str(into), download=True))
        place = f"{address}/cifar-10-python.tar.gz"
        assert said.startswith(f"{place}: expected an archive to keep in {into}, found {found}:")
        assert said.endswith("; check the address and the folder")
    assert list(into.iterdir()) == []


# --- Other names ------------------------------------------------------------------------------------------------------


def test_digits_are_all_there_and_split_by_class() -> None:
    from sklearn.datasets import load_digits

    digits, again = load("digits"), load("digits")
    assert (digits.train.sample_shape, digits.classes) == KNOWN_SHAPES["digits"] == ((1, 8, 8), 10)
    assert (len(digits.train), len(digits.test), digits.classes, digits.crop_padding) == (1437, 360, 10, None)
    assert torch.equal(digits.test.inputs, again.test.inputs)
    assert (digits.test.labels.bincount() - 36).abs().max() <= 1
    rows = [
        np.column_stack([part.inputs.flatten(1).numpy(), part.labels.numpy()]) for part in (digits.train, digits.test)
    ]
    pixels, labels = load_digits(return_X_y=True)
    official = np.column_stack([pixels, labels]).astype(np.int64)
    assert sorted(map(bytes, np.concatenate(rows).astype(np.int64))) == sorted(map(bytes, official))
    x, _ = next(test_batches(digits, digits.train, 1437))
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_validation_samples_are_of_the_training_set_and_always_the_same() -> None:
    whole, held = load("digits"), load("digits", validation=300)
    assert (len(held.train), len(held.test)) == (1137, 300)
    together = torch.cat([held.train.inputs, held.test.inputs]).flatten(1)
    assert sorted(together.tolist()) == sorted(whole.train.inputs.flatten(1).tolist())
    assert torch.equal(held.test.inputs, load("digits", validation=300, limit=310).test.inputs)
    assert not torch.equal(held.test.labels, whole.train.labels[:300])  # drawn, not the first
    assert torch.equal(load("digits", validation=300, limit=7).train.inputs, held.train.inputs[:7])
    assert message(lambda: load("digits", validation=1437)) == (
        "data.validation: expected 1 to 1436 of 1437 samples, found 1437; hold out fewer"
    )


def test_limit_keeps_the_first_of_each_split() -> None:
    whole, limited = load("digits"), load("digits", limit=400)
    assert (len(limited.train), len(limited.test)) == (400, 360)
    assert torch.equal(limited.train.inputs, whole.train.inputs[:400])
    assert limited.mean == whole.mean
    assert message(lambda: load("digits", limit=0)) == (
        "data.limit: expected at least 1 sample, found 0; leave it out for all samples"
    )


def test_a_wrong_name_names_the_near_one_and_all_there_are() -> None:
    choices = ", ".join(data.DATASETS)
    assert message(lambda: load("cifar")) == (
        f"data.name: expected one of {choices}, module:function, found 'cifar'; did you mean 'cifar10'?"
    )
    assert message(lambda: load("qqq")).endswith("found 'qqq'; use one of those")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Classes `a` (red in the middle) and `b` (blue), green where the middle square ends."""
    for split, count in (("train", 3), ("test", 1)):
        for name, color in (("b", (0, 0, 255)), ("a", (255, 0, 0))):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = np.zeros((20, 60, 3), np.uint8)
                picture[:] = (0, 255, 0)
                picture[:, 20:40] = color
                picture[:10, 20:40] = i  # so that pictures and their upper halves can be told apart
                Image.fromarray(picture).save(folder / f"{i}.PNG")
            (folder / "notes.txt").write_text("not a picture")
    return tmp_path


def test_imagefolder_takes_the_middle_square(pictures: Path) -> None:
    loaded = load("imagefolder", str(pictures), image_size=10)
    assert loaded.train.sample_shape == (3, 10, 10)
    assert loaded.train.inputs.dtype == torch.uint8
    assert (loaded.classes, loaded.crop_padding, len(loaded.mean)) == (2, None, 3)
    assert loaded.train.labels.tolist() == [0, 1, 0, 1, 0, 1]  # in turns; sorted, `a` is 0
    assert loaded.train.inputs[:, 0, 0, 5].tolist() == [0, 0, 1, 1, 2, 2]
    assert loaded.train.inputs[0, :, 8, 5].tolist() == [255, 0, 0]
    assert loaded.train.inputs[1, :, 8, 5].tolist() == [0, 0, 255]
    assert load("imagefolder", str(pictures), image_size=10, limit=2).train.labels.tolist() == [0, 1]
    x, _ = next(test_batches(loaded, loaded.test, 8))
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(loaded.mean)) / torch.tensor(loaded.std)
    torch.testing.assert_close(x[0, :, 8, 5], red)


def test_imagefolder_scales_16_bits_by_the_grays_that_there_are(pictures: Path) -> None:
    """As medical pictures have them; Pillow by itself makes all from 256 on white."""
    file, levels = pictures / "test" / "a" / "0.PNG", np.arange(0, 4096, 64).reshape(8, 8)
    assert file.is_file()
    Image.fromarray(levels.astype(np.uint16)).save(file)
    read = load("imagefolder", str(pictures), image_size=8)
    assert read.test.inputs[0].tolist() == 3 * [np.rint(levels * 255 / 4032).astype(int).tolist()]
    assert dict(read.scales) == {"gray range": [0, 4032]}
    given = load("imagefolder", str(pictures), image_size=8, gray_range="64,4095").test.inputs[0]
    assert given.tolist() == 3 * [np.rint((levels - 64).clip(0) * 255 / 4031).astype(int).tolist()]
    assert message(lambda: load("imagefolder", str(pictures), gray_range="9")) == (
        "data.gray_range: expected LOW,HIGH, two whole numbers, found '9'; for example 0,4095"
    )
    Image.fromarray(levels.astype(np.float32)).save(file, format="TIFF")
    assert "found an unreadable file (ValueError: 32 bits per pixel, where 8 or 16 can be read)" in message(
        lambda: load("imagefolder", str(pictures), image_size=8)
    )


def test_imagefolder_says_what_is_wrong(pictures: Path) -> None:
    read = partial(load, "imagefolder", str(pictures), image_size=8)
    (pictures / "test").rename(pictures / "val")
    assert len(read().test) == 2
    broken = pictures / "train" / "b" / "1.PNG"
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    assert message(read).startswith(f"{broken}: expected a picture, found an unreadable file (")
    broken.write_bytes(good)
    (pictures / "val" / "b").rename(pictures / "val" / "c")
    assert message(read) == (
        f"{pictures}: expected the same classes in train and test, found 'b' only in train, 'c' only in test; "
        "give each class to both, or name all in data.classes"
    )
    (pictures / "val" / "c").rename(pictures / "val" / "b")
    (pictures / "train" / "c").mkdir()
    assert message(read) == (
        f"{pictures}/train/c: expected pictures (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .gif), found none; "
        "add some or remove the folder"
    )
    (pictures / "train" / "c").rmdir()
    assert len(read().train) == 6
    assert message(partial(read, image_size=0)).startswith("data.image_size: expected at least 1 pixel, found 0;")
    assert message(lambda: load("imagefolder")).startswith("data.path: expected a folder with train and test inside")
    assert message(lambda: load("imagefolder", str(pictures / "train"))) == (
        f"{pictures}/train/train: expected a folder for each class, found no such folder; "
        "lay it out as train/CLASS/picture.png, test/CLASS/picture.png"
    )


OWN_DATA = """
import numpy as np, torch
from torch.utils.data import Dataset, TensorDataset

class Items(Dataset):
    def __init__(self, *items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]

pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
def arrays(): return Items((pixels[0], 2), (pixels[1], np.int32(0))), Items((pixels[1], torch.tensor(1)))
def floats():
    x, y = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    return TensorDataset(x, y), TensorDataset(x, y)
def fails(): raise OSError("disk\\ngone")
def one(): return Items()
def empty(): return arrays()[0], Items()
def picture(): return Items(("picture", 0)), Items()
def bare(): return Items(torch.zeros(3)), Items()
def named(): return Items((torch.zeros(3), "cat")), Items()
def ragged(): return Items((torch.zeros(3), 0), (torch.zeros(4), 0)), Items()
def unlike(): return Items((torch.zeros(3), 0)), Items((torch.zeros(4), 0))
def objects(): return Items((np.array([None]), 0)), Items((torch.zeros(3), 0))
class Gone(Items):
    def __getitem__(self, i): raise FileNotFoundError("scan.png")
def gone(): return Gone(1, 2), Items((torch.zeros(3), 0))
def nan(): return Items((torch.zeros(3), 0)), Items((torch.zeros(3), 0), (torch.tensor([0, float("nan"), 0]), 0))
def flat(): return TensorDataset(torch.zeros(3, 2).byte(), torch.zeros(3).long()), Items((torch.zeros(3), 0))
def pair():
    pair = TensorDataset(torch.zeros(3, 2), torch.zeros(3).long())
    pair.tensors = pair.tensors[0], torch.zeros(2).long()
    return pair, pair
number = 3
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    (tmp_path / "own_broken.py").write_text("import no_such_module_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("own_data", None)


@pytest.mark.usefixtures("own_data")
def test_a_function_in_the_working_directory_gives_data() -> None:
    arrays = load("own_data:arrays")
    assert arrays.train.inputs.flatten().tolist() == list(range(120))
    assert (arrays.train.labels.tolist(), arrays.test.labels.tolist(), arrays.classes) == ([2, 0], [1], 3)
    pixels = arrays.train.inputs.double() / 255
    assert arrays.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert arrays.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    floats = load("own_data:floats", limit=4)
    assert floats.train.inputs.dtype == torch.float32
    assert (floats.train.sample_shape, len(floats.train), floats.mean, floats.classes) == ((7,), 4, (), 3)


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_dat:arrays", ": expected a module 'own_dat' that can be imported, found ModuleNotFoundError: No module"),
        ("own_broken:any", "found ModuleNotFoundError: No module named 'no_such_module_anywhere'; run from"),
        ("own_data:array", ": expected a function 'array' in 'own_data', found none; did you mean 'arrays'?"),
        ("own_data:number", ": expected a function 'number' in 'own_data', found int; did you mean 'named'?"),
        ("own_data:fails", "a function that can be called with (), found OSError: disk gone; correct the function"),
        ("own_data:one", ": expected (train, test), found Items; return two data sets"),
        ("own_data:empty", ", test: expected at least one sample, found none; give samples to both splits"),
        ("own_data:picture", ", train, sample 0, input: expected a tensor, array or number, found str; convert it in the data set"),
        ("own_data:bare", ", train, sample 0: expected (input, target), or a dict with a key 'labels', found Tensor; convert it in the data set"),
        ("own_data:named", ", train, sample 0, target: expected a tensor, array or number, found str; convert"),
        ("own_data:ragged", ", train, sample 1: expected float32 (3,) like the first, found float32 (4,); resize or convert"),
        ("own_data:unlike", "like the training samples, float32 (3,), found float32 (4,); convert both"),
        ("own_data:objects", ", train, sample 0, input: expected numbers, found object; convert it in the data set"),
        ("own_data:gone", ", train, sample 0: expected (input, target), found FileNotFoundError: scan.png; mend the data set"),
        ("own_data:nan", ", test, input 1: expected finite values, found NaN or infinity; mend or remove it"),
        ("own_data:flat", ", train, inputs: expected uint8 (N, C, H, W), int64, bool or floating point (N, ...), found torch.uint8 (3, 2);"),
        ("own_data:pair", ", train, targets: expected 3 targets, one per input, found 2 and 3; give each sample a target"),
    ],
)
def test_a_function_that_gives_something_else_is_refused(name: str, said: str) -> None:
    assert said in message(lambda: load(name))
    assert load("own_data:arrays").classes == 3


# --- Batches ----------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Dataset:
    """Pictures of 1×1 pixel that are their own label; mean and std leave their values as they are."""
    samples = Samples(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count))
    return Dataset("numbered", samples, samples, count, mean=(0.0,), std=(1 / 255,))


def asymmetric(augment: bool, count: int = 23) -> Dataset:
    """Pictures of 3×6×5 random pixels, none black: rows, columns and channels cannot be confused."""
    pixels = torch.randint(1, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = Samples(pixels.contiguous(memory_format=torch.channels_last), torch.arange(count))
    return Dataset("random", samples, samples, count, mean=(0.1, 0.2, 0.7), std=(0.5, 0.25, 0.1), crop_padding=4 if augment else None)


def epoch_of(data: Dataset, seed: int = 0, client: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
    batches = list(train_batches(data, data.train, 4, seed=seed, client=client, epoch=epoch))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_an_epoch_shuffles_pairs_of_input_and_label() -> None:
    x, y = epoch_of(numbered(23))
    assert torch.equal(x.flatten(), y.float())
    assert torch.equal(y.sort().values, torch.arange(23))
    assert not torch.equal(y, torch.arange(23))


@pytest.mark.parametrize("augment", [False, True])
def test_seed_client_and_epoch_decide_and_nothing_else(augment: bool) -> None:
    data = asymmetric(augment)
    first, labels = epoch_of(data)
    torch.manual_seed(5)
    assert torch.equal(epoch_of(data)[0], first)
    for other in ({"seed": 1}, {"client": 1}, {"epoch": 1}):
        x, y = epoch_of(data, **other)
        assert not torch.equal(y, labels)
        assert not torch.equal(x[y.argsort()], first[labels.argsort()]) or not augment  # the draws differ too


@pytest.mark.parametrize(("samples", "sizes"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (4, [4]), (5, [4])])
def test_a_last_batch_of_one_is_left_out_of_training_only(samples: int, sizes: list[int]) -> None:
    data_of = numbered(samples)
    batches = train_batches(data_of, data_of.train, 4, seed=0, client=0, epoch=0)
    assert [len(y) for _, y in batches] == sizes
    assert batch_count(samples, 4) == len(sizes)
    tested = torch.cat([y for _, y in test_batches(data_of, data_of.test, 4)])
    assert torch.equal(tested, torch.arange(samples))


def test_the_sample_left_out_changes_with_the_epoch() -> None:
    left_out = {(set(range(9)) - set(epoch_of(numbered(9), epoch=epoch)[1].tolist())).pop() for epoch in range(20)}
    assert len(left_out) > 3


def test_a_batch_larger_than_the_shard_is_all_of_it() -> None:
    """So that a small site takes part beside large ones; but never by a single sample, which BatchNorm cannot take."""
    ten = numbered(10)
    train = partial(train_batches, ten, ten.train, seed=0, client=0, epoch=0)
    assert message(lambda: train(0)) == "train.batch_size: expected at least 1, found 0; 128 is usual"
    for size in (10, 11, 100):
        assert [len(y) for _, y in train(size)] == [10]
    one = ten.train.take(torch.tensor([3]))
    assert message(lambda: train_batches(ten, one, 4, seed=0, client=0, epoch=0)) == (
        "train.batch_size: expected at least 2 training samples, or batches of 1, found 1 with batches of 4; "
        "give more samples"
    )
    assert batch_count(1, 1) == 1
    said = message(lambda: test_batches(ten, ten.test, 0))
    assert said == "test batch size: expected at least 1, found 0; 256 is usual"
    assert [len(y) for _, y in test_batches(ten, ten.test, 11)] == [10]


def plainly(data_of: Dataset, indices: Tensor, draws: torch.Generator) -> Tensor:
    """One picture after the other, as one would write it first."""
    pictures = []
    top, left, flip = draw_crop_and_flip(len(indices), 4, draws)
    for i, index in enumerate(indices):
        picture = data_of.train.inputs[index].numpy()  # (C, H, W)
        _, height, width = picture.shape
        padded = np.pad(picture, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        picture = padded[:, top[i] + 4 : top[i] + 4 + height, left[i] + 4 : left[i] + 4 + width]
        picture = picture[:, :, ::-1] if flip[i] else picture
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (data_of.mean, data_of.std))
        pictures.append((picture / 255 - mean) / std)
    return torch.from_numpy(np.stack(pictures)).float()


def test_augmented_batches_are_those_of_a_plain_loop() -> None:
    data_of = asymmetric(augment=True)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(derive_seed(3, "order", 1, 2)))
    draws = torch.Generator().manual_seed(derive_seed(3, "augment", 1, 2))
    batches = list(train_batches(data_of, data_of.train, 8, seed=3, client=1, epoch=2))
    assert len(batches) == 3
    for (x, y), indices in zip(batches, order.split(8), strict=True):
        assert torch.equal(y, indices)
        torch.testing.assert_close(x, plainly(data_of, indices, draws), atol=1e-5, rtol=1e-6)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.dtype == torch.float32


def test_draws_cover_every_offset_and_are_independent() -> None:
    top, left, flip = draw_crop_and_flip(9000, 4, torch.Generator().manual_seed(0))
    table = torch.zeros(9, 9, 2).index_put((top + 4, left + 4, flip.long()), torch.ones(9000), accumulate=True)
    assert table.min() > 20  # 55 expected of each of the 162 combinations
    assert table.max() < 100


def test_test_batches_are_normalized_and_in_order() -> None:
    data_of = asymmetric(augment=True)
    x = torch.cat([x for x, _ in test_batches(data_of, data_of.test, 11)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data_of.mean, data_of.std))
    torch.testing.assert_close(x, (data_of.test.inputs / 255 - mean) / std, atol=1e-5, rtol=1e-6)


def test_batches_do_not_depend_on_threads_or_memory_layout() -> None:
    data_of = asymmetric(augment=True, count=400)
    rows = replace(data_of, train=Samples(data_of.train.inputs.contiguous(), data_of.train.labels))
    assert not rows.train.inputs.is_contiguous(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [
                next(train_batches(each, each.train, 400, seed=0, client=0, epoch=0))[0] for each in (data_of, rows)
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize("shape", [(7,), (3, 6, 5)])
def test_floating_point_inputs_are_taken_as_they_are_and_copied(shape: tuple[int, ...]) -> None:
    samples = Samples(torch.randn(10, *shape), torch.arange(10))
    floats = Dataset("floats", samples, samples, 10, mean=(), std=())
    before = samples.inputs.clone()
    for batches in (
        train_batches(floats, samples, 5, seed=0, client=0, epoch=0), test_batches(floats, samples, 5)
    ):
        for x, y in batches:
            assert torch.equal(x, before[y])
            x.zero_()  # as an in-place layer may
    assert torch.equal(samples.inputs, before)


def test_take_copies_in_the_order_asked_for() -> None:
    samples = asymmetric(augment=False).train
    taken = samples.take(torch.tensor([5, 2, 5]))
    assert (len(taken), taken.sample_shape, taken.labels.tolist()) == (3, (3, 6, 5), [5, 2, 5])
    assert torch.equal(taken.inputs, samples.inputs[[5, 2, 5]])
    assert taken.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": 22}, ", train, label 22: expected a class in 0..21, found 22; number the classes from 0"),
        ({"mean": (0.5,)}, ", mean and std: expected 3 of each, std above 0, found (0.5,) and (0.5, 0.25, 0.1);"),
        ({"std": (0.5, 0.0, 1.0)}, ", mean and std: expected 3 of each, std above 0, found"),
        ({"crop_padding": 5}, ": expected pictures (C, H, W), with a margin less than their height and width, found (3, 6, 5) with 5; "),
    ],
)
def test_a_data_set_checks_itself(change: dict[str, object], said: str) -> None:
    assert "data random" + said in message(lambda: replace(asymmetric(augment=True), **change))  # type: ignore[arg-type]
