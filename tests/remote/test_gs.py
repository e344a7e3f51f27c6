"""Stores in a bucket of Google Cloud Storage, as an emulator on this machine serves it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from gradpipe import InputError, StoreError, open_store, prune
from gradpipe.store.objects import COMMIT_KEY, COPY_KEY
from tests.support.cases import files_of, pruning
from tests.support.far import BUCKET, OBJECT, ROOT, copied
from tests.support.ranked import free_port

URL = f"gs://{BUCKET}/store"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fsspec.AbstractFileSystem]:
    """The emulator's file system; skipped where it, or gcsfs, is not installed."""
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    port = str(free_port())
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1"]
    command += ["--port", port, "--in-memory", "--default-bucket", BUCKET]
    log = tmp_path_factory.mktemp("emulator") / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(command, stdout=said, stderr=said) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks another API, by gRPC
        gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        made = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
        wait_for(made, process, log)
        yield made
        process.terminate()


def wait_for(
    files: fsspec.AbstractFileSystem, process: "subprocess.Popen[bytes]", log: Path
) -> None:
    """Wait until the emulator answers; it fails if it has ended."""
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            files.ls(BUCKET)
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(log.read_text())


@pytest.fixture
def bucket(files: fsspec.AbstractFileSystem) -> Iterator[fsspec.AbstractFileSystem]:
    """The bucket, empty again afterwards."""
    yield files
    files.invalidate_cache()
    for path in files.find(BUCKET):
        files.rm_file(path)


def objects(bucket: fsspec.AbstractFileSystem) -> dict[str, bytes]:
    """What lies in the store's place."""
    bucket.invalidate_cache()
    root = URL.removeprefix("gs://")
    return {path.removeprefix(f"{root}/"): bucket.cat_file(path) for path in bucket.find(root)}


def test_a_store_is_copied_there_and_back(
    bucket: fsspec.AbstractFileSystem, near: Path, tmp_path: Path
) -> None:
    """The same bytes in the bucket and in the folder that it is copied to again; nothing beside."""
    copied(near, URL)
    assert objects(bucket) == files_of(near)
    copied(URL, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(near)


def test_a_copy_that_was_killed_is_no_store_and_goes_on(
    bucket: fsspec.AbstractFileSystem, near: Path
) -> None:
    """What it has done is found there; another store in its place is refused."""
    copied(near, URL)
    record = bucket.cat_file(f"{URL}/{COMMIT_KEY}")
    for key in (COMMIT_KEY, ROOT, OBJECT):
        bucket.rm_file(f"{URL}/{key}")
    bucket.pipe_file(f"{URL}/{COPY_KEY}", record)
    with pytest.raises(StoreError, match="is being copied"):
        open_store(URL)
    with pytest.raises(InputError, match="another store"):
        copied(near.with_name("store-v2"), URL)
    copied(near, URL)
    assert objects(bucket) == files_of(near)


@pytest.mark.usefixtures("bucket")
def test_pruning_from_a_bucket_gives_the_bytes_of_a_folder(workplace: Path, tmp_path: Path) -> None:
    """Every byte is held against the record on the way."""
    copied(workplace / "store", URL)
    for name, store in (("near", str(workplace / "store")), ("far", URL)):
        prune(pruning(workplace, tmp_path / name, store=store, sparsities=(0.5,)))
    assert files_of(tmp_path / "near") == files_of(tmp_path / "far")


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_named(near: Path) -> None:
    """For a copy as for a reader."""
    with pytest.raises(InputError, match=r"cannot copy to gs://nowhere/store"):
        copied(near, "gs://nowhere/store")
    with pytest.raises((InputError, StoreError), match=r"gs://nowhere/store"):
        open_store("gs://nowhere/store")
