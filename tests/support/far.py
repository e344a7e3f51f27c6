"""An S3 server far away: moto in a process of its own, behind a proxy that can fail.

Fixtures for `tests/remote`: `far` is the bucket that a test may fill, `line` the proxy on the way,
`library` a store that a model can be pruned by, `near` and `other` two stores in folders.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import s3fs

from gradpipe import GradientStore
from gradpipe.pipeline.stores.config import CopyConfig
from gradpipe.pipeline.stores.copy import copy
from tests.support.cases import files_of
from tests.support.faulty import STALL, Proxy, proxy

DATA = Path(__file__).parents[1] / "data"
OBJECT = "layers/model.layers.0.mlp.up_proj/grad_l1/codes/c/0/0"
BUCKET = "far"
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAOFNOONE", "AWS_SECRET_ACCESS_KEY": "secret-of-no-one"}
IMPATIENT = {"config_kwargs": {"read_timeout": STALL / 2, "retries": {"max_attempts": 3}}}
ROOT = "zarr.json"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """An S3 server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(600):
            with socket.socket() as line:
                if line.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield "127.0.0.1", port
        process.terminate()


@pytest.fixture(scope="module")
def line(server: tuple[str, int]) -> Iterator[Proxy]:
    """The way to it."""
    with proxy(*server) as made:
        yield made


@pytest.fixture
def far(line: Proxy, server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bucket, empty, by a client that takes no detour; the environment leads others there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    told = {
        **SECRETS,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": line.url,
        "AWS_MAX_ATTEMPTS": "2",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    client_of(server).create_bucket(Bucket=BUCKET)
    bucket = boto3.resource("s3", endpoint_url="http://{}:{}".format(*server)).Bucket(BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()
    line.reset()
    yield bucket
    bucket.objects.all().delete()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def impatient(far: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 (it is first)
    """Clients that wait for less than a stall."""
    monkeypatch.setitem(fsspec.config.conf, "s3", IMPATIENT)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def near() -> Path:
    """A store, in a folder."""
    return DATA / "store-v1"


@pytest.fixture(scope="module")
def other() -> Path:
    """A store of another model."""
    return DATA / "store-v2"


@pytest.fixture(scope="module")
def library(server: tuple[str, int], workplace: Path) -> str:
    """A store far away that a model can be pruned by."""
    client = client_of(server)
    client.create_bucket(Bucket="library")
    for key, data in files_of(workplace / "store").items():
        client.put_object(Bucket="library", Key=f"store/{key}", Body=data)
    return "s3://library/store"


def client_of(server: tuple[str, int]) -> Any:
    """A client that takes no detour."""
    return boto3.client(
        "s3",
        endpoint_url="http://{}:{}".format(*server),
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def objects_in(bucket: Any, prefix: str = "store/") -> dict[str, bytes]:
    """What lies below a prefix."""
    return {
        x.key.removeprefix(prefix): x.get()["Body"].read()
        for x in bucket.objects.filter(Prefix=prefix)
    }


def url(name: str = "store") -> str:
    """A place in the bucket."""
    return f"s3://{BUCKET}/{name}"


def copied(source: object, destination: object, **options: Any) -> GradientStore:
    """Copy a store."""
    return copy(CopyConfig(source=str(source), destination=str(destination), **options))


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said: one line, and no credential in it."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipe: ")
    assert err.count("\n") == 1
    assert not [secret for secret in SECRETS.values() if secret in err]
    return err
