"""The store of uploads: what comes back is what came, the disk stays below the limit, crashes and a full disk are said."""

import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfpass.cut import CutBatch
from halfpass.errors import InputError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import read_batch, write_batch
from halfpass.wire.store import MINIMUM_BYTES, UploadStore

MB = 1 << 20
IDENTITY = {"model": "resnet20", "cut": "layer1", "cut shapes": ((16, 32, 32),), "classes": 10}


def create(folder, limit_bytes=MINIMUM_BYTES, identity=IDENTITY):
    return UploadStore.open(folder, identity=identity, limit_bytes=limit_bytes)


def upload(step, size=MB, client=0, epoch=0, test=False):
    """An upload of about `size` bytes, in two micro-batches, that only its step and size decide."""
    data = random.Random(step).randbytes(size)
    return [
        pb.Batch(test=test, client=client, epoch=epoch, step=step, before=i, tensors=[pb.Tensor(data=data[i::2])])
        for i in range(2)
    ]


def size_of(batches):
    return sum(len(batch.tensors[0].data) for batch in batches)


def add_many(store, count):
    for step in range(count):
        store.add(upload(step))


def holds(store, keys):
    """Whether these uploads come back as they came."""
    return all(
        (batches := store.read(key))
        and batches == upload(key.step, size_of(batches), key.client, key.epoch, key.test)
        for key in keys
    )


def disk_bytes(folder):
    """What `du` says."""
    return sum(path.stat().st_blocks * 512 for path in (folder, *folder.iterdir()))


def names(keys):
    return [key[:3] for key in keys]


def steps(keys):
    return [key.step for key in keys]


@pytest.mark.parametrize("codec", ["none", "bf16"])
def test_what_comes_back_is_what_came_also_after_a_restart(tmp_path, codec):
    batches = [
        CutBatch(client, epoch, step, (torch.randn(4, 3, 5, 5), torch.randn(4, 7)), torch.tensor([3, 1, 4, 1]))
        for epoch in (0, 1) for step in (0, 1) for client in (1, 0)
    ]  # fmt: skip
    with create(tmp_path / "store") as store:
        for batch in batches:
            message = write_batch(batch, codec).batch
            assert store.read(store.add([message])) == [message]
        store.flush()
    with UploadStore.open_existing(tmp_path / "store") as store:
        assert store.identity == {**IDENTITY, "cut shapes": [[16, 32, 32]]}
        assert names(store.keys()) == [(b.client, b.epoch, b.step) for b in batches]
        assert (store.held, store.evicted, store.keys(test=True)) == (8, 0, [])
        for key, batch in zip(store.keys(), batches, strict=True):
            back = read_batch(*store.read(key))
            expected = read_batch(write_batch(batch, codec).batch)
            assert all(map(torch.equal, back.tensors, expected.tensors))
            assert torch.equal(back.targets, batch.targets)


def test_of_a_test_that_does_not_fit_nothing_stays(tmp_path):
    """Nor what comes after, though it would fit again: a part of a test set would give a wrong accuracy."""
    with create(tmp_path / "store") as store:
        kept = store.add(upload(0, 100))
        for size, left in ((MINIMUM_BYTES // 2, 1), (MINIMUM_BYTES // 2, 0), (100, 0)):
            store.add_test(pb.Batch(test=True, tensors=[pb.Tensor(data=bytes(size))]))
            assert len(store.keys(test=True)) == left
        assert store.read(kept)


def test_the_disk_stays_below_the_limit_whatever_the_sizes(tmp_path):
    """Sizes from 1 byte to nearly the limit, so that free space lies in pieces; the newest uploads are always there."""
    limit, draws = MINIMUM_BYTES, random.Random(1)
    folder, sizes = tmp_path / "store", []
    with create(folder, limit) as store:
        for step in range(250):
            sizes.append(12 * MB if step % 60 == 59 else int(2 ** draws.uniform(0, 22)))
            key = store.add(upload(step, sizes[-1]))
            assert disk_bytes(folder) <= limit
            assert holds(store, [key])
            if step > 150 and step % 60 < 50:  # nothing is evicted without need: with one upload more it is too much
                held = store.keys()
                assert steps(held) == list(range(held[0].step, step + 1))  # the oldest went first
                first = held[0].step  # what goes at a time is a sixteenth of the limit, or one upload
                assert sum(sizes[max(0, first - 1) :]) + limit // 16 > 0.9 * limit
        assert holds(store, store.keys())
        assert (store.held, store.evicted) == (len(store.keys()), 250 - len(store.keys()))
        evicted = store.keys()[0]._replace(step=0, number=0)
        assert store.read(evicted) == []
        assert 0.5 * limit < store.used_bytes <= disk_bytes(folder)


@pytest.mark.parametrize("number", [0, 3, 7, 9])
def test_what_is_forgotten_comes_again_under_the_same_numbers(tmp_path, number):
    """Of several segments, after a restart too, and where all that was to stay has been evicted by then."""
    with create(tmp_path) as store:
        keys = [store.add(upload(step, size=MB // 2)) for step in range(9)]
        assert len(list(tmp_path.glob("uploads-*"))) > 2
        store.add(upload(0, test=True))
    with create(tmp_path) as store:
        store.forget(number)
        assert (store.keys(), store.keys(test=True), store.added) == (keys[:number], [], number)
        again = [store.add(upload(step, size=MB // 2)) for step in range(number, 9)]
        assert again == keys[number:]
        assert store.read(keys[8]) == upload(8, size=MB // 2)
    with create(tmp_path) as store:
        assert (store.keys(), store.added) == (keys, 9)
        add_many(store, 40)
        assert store.evicted > 9
        store.forget(5)
        assert (store.added, store.add(upload(5)).number) == (5, 5)


def test_test_uploads_stay_until_those_of_another_epoch(tmp_path):
    with create(tmp_path / "store") as store:
        for step in range(3):
            store.add(upload(step, epoch=1, test=True))
        add_many(store, 40)
        assert store.evicted > 20
        assert names(store.keys(test=True)) == [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
        assert holds(store, store.keys(test=True) + store.keys())
        used, held = store.used_bytes, store.held
        store.add(upload(7, epoch=2, test=True))
        assert names(store.keys(test=True)) == [(0, 2, 7)]
        assert holds(store, store.keys(test=True) + store.keys())
        assert (store.held, used - store.used_bytes > 1.9 * MB) == (held, True)


def test_a_batch_above_the_limit_says_what_it_needs_and_evicts_nothing(tmp_path):
    with create(tmp_path / "store") as store:
        store.add(upload(0, 2 * MB, test=True))
        key = store.add(upload(0))
        with pytest.raises(InputError) as caught:
            store.add(upload(1, 14 * MB))
        assert re.fullmatch(
            r"server.store_limit: expected at least \d+ bytes for a batch and the test uploads, found 16777216; "
            r"raise it, or send smaller batches",
            str(caught.value),
        )
        assert store.keys() == [key]
        store.add(upload(2))
    least = int(re.search(r"\d+", str(caught.value))[0])
    assert least < 19 * MB
    with create(tmp_path / "store", least) as store:  # that much is enough
        store.add(upload(1, 14 * MB))
        assert disk_bytes(tmp_path / "store") <= least
        assert holds(store, store.keys() + store.keys(test=True))


def test_a_smaller_limit_evicts_the_oldest_and_too_small_a_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"server.store_limit: expected at least 16777216 bytes, found 1000; raise it"):
        create(tmp_path / "store", 1000)
    with create(tmp_path / "store", 64 * MB) as store:
        add_many(store, 30)
    with create(tmp_path / "store", 20 * MB) as store:
        assert disk_bytes(tmp_path / "store") <= 20 * MB
        assert steps(store.keys()) == list(range(30 - store.held, 30))
        assert holds(store, store.keys())
        assert store.held > 15


def test_another_identity_is_refused_and_the_first_difference_named(tmp_path):
    create(tmp_path / "store").close()
    with pytest.raises(InputError) as caught:
        create(tmp_path / "store", identity={**IDENTITY, "cut": "layer2", "classes": 100})
    assert str(caught.value) == (
        f"store {tmp_path}/store: expected cut 'layer2' (the run's), found cut 'layer1' (the store's); "
        "choose another folder for server.store, or the same model and cut"
    )
    with pytest.raises(InputError, match=r"expected classes None \(the run's\), found classes 10 \(the store's\)"):
        create(tmp_path / "store", identity={key: IDENTITY[key] for key in ("model", "cut", "cut shapes")})
    create(tmp_path / "store").close()


def test_one_writer_or_several_readers(tmp_path):
    with create(tmp_path / "store"):
        for again in (create, UploadStore.open_existing):
            with pytest.raises(InputError) as caught:
                again(tmp_path / "store")
            assert str(caught.value) == (
                f"store {tmp_path}/store: expected a store that no one writes to, found one that is open elsewhere; "
                "wait until it is closed"
            )
    with UploadStore.open_existing(tmp_path / "store"), pytest.raises(InputError, match="open elsewhere"):
        create(tmp_path / "store")
    create(tmp_path / "store").close()


KEEP_ADDING = """
import signal, sys
from pathlib import Path
from tests.test_store import create, upload
signal.alarm(100)
with create(Path(sys.argv[1])) as store:
    for step in range(int(sys.argv[2]), 10**6):
        if step % 10 == 0:
            store.add(upload(step, epoch=step, test=True))
        store.add(upload(step))
        print(step, flush=True)
"""


def in_a_process(script, *arguments, before=()):
    return subprocess.Popen(
        [*before, sys.executable, "-c", script, *map(str, arguments)], cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_killed_process_leaves_all_that_it_had_added(tmp_path):
    """SIGKILL while it adds and evicts as fast as it can; the next process goes on with the same store."""
    begin = 0
    for kill_after in (3, 25, 40):
        with in_a_process(KEEP_ADDING, tmp_path / "store", begin) as process:
            said = [next(process.stdout) for _ in range(kill_after)]
            process.kill()
            said += process.stdout.read().splitlines()
        assert process.returncode == -9
        last = int([line for line in said if line.strip().isdecimal()][-1])
        with UploadStore.open_existing(tmp_path / "store") as store:
            held = steps(store.keys())
            assert held == list(range(held[0], held[-1] + 1))
            assert held[-1] - last in (0, 1)  # 1: added, and killed before it said so
            assert held[0] == 0 or len(held) > 10
            assert holds(store, store.keys() + store.keys(test=True))
        begin = held[-1] + 1
    with create(tmp_path / "store") as store:
        total = sum(pb.Upload(batches=upload(key.step)).ByteSize() for key in store.keys() + store.keys(test=True))
        assert store.used_bytes < 1.02 * total + MB  # half-removed uploads take no room
        assert disk_bytes(tmp_path / "store") <= MINIMUM_BYTES


def expect_full(store, folder):
    """Adds until the disk is full; what came before is still there."""
    with pytest.raises(RunError) as caught:
        add_many(store, 100)
    reason = r"(No space left on device|File too large)"
    assert re.fullmatch(
        rf"store {folder}: expected room on the disk, found {reason}; "
        r"free space, or lower server.store_limit",
        str(caught.value),
    )
    assert store.held >= 1
    assert steps(store.keys()) == list(range(store.held))
    assert holds(store, store.keys())
    return store.held


def test_a_file_that_may_not_grow_is_said(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with create(tmp_path / "store", 256 * MB) as store:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MB, hard))
            held = expect_full(store, tmp_path / "store")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.add(upload(held))  # and it goes on where there is room
        assert holds(store, store.keys())
        assert store.held == held + 1


FILL_THE_DISK = """
import sys
from pathlib import Path
from tests.test_store import MB, create, expect_full, holds, upload
disk = Path(sys.argv[1])
(disk / "other").write_bytes(bytes(4 * MB))
with create(disk / "store") as store:
    held = expect_full(store, disk / "store")
    (disk / "other").unlink()
    store.add(upload(held))
with create(disk / "store") as store:
    assert store.held == held + 1 and holds(store, store.keys())
print("done")
"""


def test_a_full_disk_is_said(tmp_path):
    """On a real disk of 10 MB, mounted in a namespace of the child's own."""
    mount = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
             f'mount -t tmpfs -o size=10m tmpfs {tmp_path} && exec "$@"', "sh")  # fmt: skip
    try:
        if subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
            pytest.skip("no disk can be mounted here")
    except FileNotFoundError:
        pytest.skip("no unshare here")
    with in_a_process(FILL_THE_DISK, tmp_path, before=mount) as process:
        assert process.communicate(timeout=120)[0] == "done\n"


@pytest.mark.parametrize("about", ["", "no such thing", "[1]", '{"format": 3}', '{"format": 1, "identity": {}}'])
def test_a_damaged_store_is_refused_in_one_line_and_a_good_one_taken(tmp_path, about):
    with create(tmp_path / "store") as store:
        add_many(store, 3)
    file = tmp_path / "store" / "store.json"
    good = file.read_text()
    file.write_text(about)
    for again in (UploadStore.open_existing, create):
        with pytest.raises(InputError) as caught:
            again(tmp_path / "store")
        text = str(caught.value)
        assert re.match(rf"store {tmp_path}/store: expected (an undamaged store of uploads|format 3), found ", text)
        assert "\n" not in text
    file.write_text(good)
    with create(tmp_path / "store") as store:
        assert holds(store, store.keys())
        assert store.held == 3


def damaged(call):
    """What a refusal says, which is one line with a remedy."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith("; restore the store from a copy, or train anew into another folder")
    return text.rpartition(";")[0]


def test_what_a_killed_process_left_of_an_upload_is_not_there_and_what_was_changed_is_named(tmp_path):
    with create(tmp_path / "store") as store:
        for step in range(8):
            store.add(upload(step, 50_000))
    (file,) = (tmp_path / "store").glob("uploads-*")
    content = bytearray(file.read_bytes()[:-1])
    content[3 * len(content) // 8 + 9000] ^= 1
    file.write_bytes(content)
    for again in (UploadStore.open_existing, create):
        assert damaged(lambda again=again: again(tmp_path / "store")) == (
            f"store {tmp_path}/store: expected 8 training uploads from number 0 on, as closed.json says, found 7 from number 0 on"
        )
    (tmp_path / "store" / "closed.json").unlink()  # as if it had been killed
    with create(tmp_path / "store") as store:
        keys = store.keys()
        assert steps(keys) == list(range(7))
        assert re.fullmatch(
            rf"store {tmp_path}/store, {file.name}, upload of client 0, epoch 0, step 3: expected checksum [0-9a-f]{{8}}, "
            "found [0-9a-f]{8}",
            damaged(lambda: store.read(keys.pop(3))),
        )
        assert holds(store, [*keys, store.add(upload(8))])  # where the half one was
    with create(tmp_path / "store") as store:
        assert steps(store.keys()) == [*range(7), 8]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a store of few bytes in several segments of either kind."""
    monkeypatch.setattr("halfpass.wire.store.SEGMENTS", MINIMUM_BYTES // 150)
    with create(tmp_path / "store", identity={"classes": 10}) as store:
        for step in range(5):
            store.add(upload(step, 6))
        for step in range(3):
            store.add(upload(step, 4, test=True))
        assert len(list(store.folder.glob("*.segment"))) == 5
    return tmp_path / "store"


def state(folder):
    """All that a store holds."""
    with UploadStore.open_existing(folder) as store:
        keys = store.keys() + store.keys(test=True)
        return store.identity, store.added, keys, [store.read(key) for key in keys]


@pytest.mark.parametrize("closed", [True, False])
def test_of_no_flipped_bit_an_upload_is_lost_without_a_word(small, closed):
    if not closed:
        (small / "closed.json").unlink()
    whole, refused, kept = state(small), 0, 0
    for file in sorted(small.iterdir()):
        content = file.read_bytes()
        for bit in range(closed, 8 * len(content), 2 if closed else 5):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            try:
                found = state(small)
            except InputError:
                refused += 1
            else:
                assert found == whole, (file.name, bit)
                kept += 1
        file.write_bytes(content)
    assert state(small) == whole
    assert refused > 400
    assert kept < 0.05 * refused  # such as a space of store.json that became a line's end


def test_what_is_cut_off_is_told_unless_a_killed_process_may_have_been_at_it(small):
    whole = state(small)
    newest = {max(small.glob(f"{kind}-*")).name for kind in ("uploads", "test")}
    for closed in (True, False):
        if not closed:
            (small / "closed.json").unlink()
        for file in sorted(small.iterdir()):
            content = file.read_bytes()
            for length in range(len(content)):
                file.write_bytes(content[:length])
                if not closed and file.name in newest:
                    identity, _, keys, batches = state(small)
                    assert identity == whole[0]
                    assert all(whole[3][whole[2].index(key)] == batch for key, batch in zip(keys, batches, strict=True))
                    assert len(keys) in (len(whole[2]) - 1, len(whole[2]) - 2)
                else:
                    with pytest.raises(InputError):
                        state(small)
            file.write_bytes(content)
    assert state(small) == whole


def test_damage_is_said_with_its_segment_and_place(small):
    files = sorted(small.glob("uploads-*"))
    place, content = f"store {small}, {files[1].name}", files[1].read_bytes()
    files[1].write_bytes(content[:-1])
    assert damaged(lambda: state(small)) == f"{place}: expected all of upload 3, found the file's end, byte {len(content) - 1}"
    files[1].write_bytes(content[:20] + b"?" + content[21:])
    assert damaged(lambda: state(small)) == f"{place}: expected upload 2, found a damaged header at byte 0"
    files[1].write_bytes(files[0].read_bytes())
    assert damaged(lambda: state(small)) == f"{place}: expected upload 2, found training upload 0 at byte 0"
    files[1].unlink()
    assert damaged(lambda: state(small)) == (
        f"store {small}, {files[2].name}: expected upload 2 to come after {files[0].name}, found 4 in its name"
    )
    files[1].write_bytes(content)
    newest = files[2].read_bytes()
    files[2].unlink()
    assert damaged(lambda: state(small)) == (
        f"store {small}: expected 5 training uploads from number 0 on, as closed.json says, found 4 from number 0 on"
    )
    files[2].write_bytes(newest)
    about = small / "store.json"
    good = about.read_text()
    about.write_text(good.replace("10", "11"))
    assert re.fullmatch(f"store {small}, store.json: expected an identity of checksum [0-9]+, found [0-9]+", damaged(lambda: state(small)))
    about.write_text(good)
    (small / "closed.json").write_text('{"uploads": [0, 5], "test": [3, 0]}')
    assert damaged(lambda: state(small)) == f"store {small}, closed.json: expected numbers of uploads, found [3, 0]"
    (small / "closed.json").unlink()
    (small / "uploads-x.segment").touch()
    with pytest.raises(InputError, match=r"expected an undamaged store of uploads, found a file uploads-x.segment; choose"):
        state(small)
    (small / "uploads-x.segment").unlink()
    assert state(small)[1] == 5


def test_a_store_that_all_uploads_have_left_goes_on_with_its_numbers(tmp_path):
    with create(tmp_path) as store:
        add_many(store, 40)
        assert store.evicted > 5
        store.forget(5)
    with create(tmp_path) as store:
        assert (store.added, store.add(upload(5)).number) == (5, 5)


def test_a_store_that_is_being_added_to_does_not_say_that_it_is_closed(tmp_path):
    said = tmp_path / "closed.json"
    with create(tmp_path) as store:
        assert not said.exists()
        store.add(upload(0))
    assert said.read_text() == '{"uploads": [0, 1], "test": [0, 0]}'
    with pytest.raises(InputError, match="found cut 'layer1'"):
        create(tmp_path, identity={**IDENTITY, "cut": "layer2"})
    assert said.exists()
    with UploadStore.open_existing(tmp_path):
        assert said.exists()
    with create(tmp_path):
        assert not said.exists()
    assert said.exists()


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        UploadStore.open_existing(tmp_path / "store")
    assert str(caught.value) == (
        f"store {tmp_path}/store: expected a store of uploads, found none; give its folder as server.store"
    )
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError) as caught:
        create(tmp_path)
    assert str(caught.value) == (
        f"store {tmp_path}: expected a store of uploads or an empty folder, found other files; "
        "choose another folder for server.store"
    )
    with pytest.raises(InputError, match="expected a folder that can be written, found Not a directory"):
        create(tmp_path / "thesis.tex" / "store")
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say")
def test_what_was_read_does_not_stay_in_memory(tmp_path):
    def mapped_bytes():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    with create(tmp_path / "store", 100 * MB) as store:
        before = mapped_bytes()
        for step in range(160):  # and evicted
            store.add(upload(step))
            assert mapped_bytes() < before + 50 * MB
        keys = store.keys()
        for key in keys:
            store.read(key)
            assert mapped_bytes() < before + 50 * MB
