"""Stores that are not in a local folder: S3 as moto serves it, memory, `file://`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
import s3fs
from moto.core.authorization import enable_iam_authentication
from moto.server import ThreadedMotoServer

from gradpipe import (
    GradientStore,
    GradpipeError,
    InputError,
    StoreError,
    collect,
    prune,
)
from gradpipe.store.objects import COMMIT_KEY
from tests.support.cases import collecting, files_of, pruning, written
from tests.support.workplace import run_pipe

BUCKET = "statistics"
URL = f"s3://{BUCKET}/gpt2/store"
CREDENTIALS = {"key": "reader", "secret": "of-no-consequence"}
OBJECT = "layers/transformer.h.1.mlp.c_fc/grad_l1/codes/c/0/0"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 and the store of what pruning it needs."""
    root = written(tmp_path_factory.mktemp("remote"), "gpt2")
    changes: dict[str, Any] = {"statistics": ("grad_l1", "act_l2"), "encoding": "compact"}
    collect(collecting(root, num_samples=2, seq_len=8, **changes))
    return root


@pytest.fixture(scope="module")
def endpoint(workplace: Path) -> Iterator[str]:
    """An S3 server on this machine that holds a copy of the store."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    client = _client(f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    for key, data in files_of(workplace / "store").items():
        client.put_object(Bucket=BUCKET, Key=f"gpt2/store/{key}", Body=data)
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No AWS configuration but a test's own, and no file system kept from an earlier one."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the default waits ten seconds in all
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def standard_environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server and the credentials, as every AWS tool is told them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CREDENTIALS["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CREDENTIALS["secret"])


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, workplace: Path) -> Iterator[str]:
    """Where the store lies: three kinds of file system."""
    if request.param == "s3":
        request.getfixturevalue("standard_environment")
        yield URL
    elif request.param == "file":
        yield (workplace / "store").as_uri()
    else:
        memory = fsspec.filesystem("memory")
        for key, data in files_of(workplace / "store").items():
            memory.pipe(f"/remote/{key}", data)
        yield "memory://remote"
        memory.rm("/remote", recursive=True)


@pytest.fixture
def objects(endpoint: str, workplace: Path) -> Iterator[Any]:
    """The server's client, for a test to spoil `OBJECT` and the commit record with."""
    client = _client(endpoint)
    yield client
    for key in (OBJECT, COMMIT_KEY):
        data = (workplace / "store" / key).read_bytes()
        client.put_object(Bucket=BUCKET, Key=f"gpt2/store/{key}", Body=data)


def _client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=CREDENTIALS["key"],
        aws_secret_access_key=CREDENTIALS["secret"],
    )


def assert_same(remote: GradientStore, local: GradientStore) -> None:
    """Both say the same of themselves and hold the same sums."""
    assert remote.digest == local.digest
    assert remote.spec == local.spec
    assert remote.sizes() == local.sizes()
    np.testing.assert_array_equal(remote.input_ids(), local.input_ids(), strict=True)
    for layer in local.spec.layers:
        for statistic in local.spec.statistics:
            sums = remote.read_norms(layer, statistic)
            np.testing.assert_array_equal(sums, local.read_norms(layer, statistic), strict=True)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to stderr: one line, and no traceback."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pipe: ")
    assert "Traceback" not in line
    return line


def test_options_reach_the_file_system(endpoint: str, workplace: Path) -> None:
    """Endpoint and credentials may be given in the call, with none in the environment."""
    options = {**CREDENTIALS, "endpoint_url": endpoint}
    assert_same(GradientStore.open(URL, options), GradientStore.open(workplace / "store"))


def test_a_store_reads_the_same_from_everywhere(url: str, workplace: Path) -> None:
    """Digest, spec, tokens and sums do not depend on the file system."""
    assert_same(GradientStore.open(url), GradientStore.open(workplace / "store"))
    assert_same(GradientStore.open(url + "/"), GradientStore.open(workplace / "store"))


def test_pruning_from_everywhere_gives_the_same_bytes(
    url: str, workplace: Path, tmp_path: Path
) -> None:
    """No file of the output tells where the store was read."""
    for name, store in (("local", str(workplace / "store")), ("remote", url)):
        targets = {"patterns": ("2:4",), "sparsities": (0.6,)}
        prune(pruning(workplace, tmp_path / name, store=store, **targets))
    assert files_of(tmp_path / "local") == files_of(tmp_path / "remote")


@pytest.mark.usefixtures("standard_environment")
def test_the_command_reads_stores_from_s3(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`pipe prune`, `store info` and `store verify` take the URL where they take a path."""
    model, local = str(workplace / "model"), str(workplace / "store")
    assert run_pipe(monkeypatch, "prune", model, URL, str(tmp_path / "remote")) == 0
    assert run_pipe(monkeypatch, "prune", model, local, str(tmp_path / "local")) == 0
    assert files_of(tmp_path / "local") == files_of(tmp_path / "remote")
    capsys.readouterr()
    assert run_pipe(monkeypatch, "store", "info", URL, "--json", "-") == 0
    remote = capsys.readouterr().out
    assert run_pipe(monkeypatch, "store", "info", local, "--json", "-") == 0
    assert capsys.readouterr().out == remote
    assert run_pipe(monkeypatch, "store", "verify", URL) == 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 1]), id="one bit"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: None, id="missing"),
    ],
)
@pytest.mark.usefixtures("standard_environment")
def test_a_damaged_or_missing_object_is_found(
    damage: Any,
    objects: Any,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Reading and pruning name it and leave nothing behind; `store verify` ends with 3."""
    spoilt = damage((workplace / "store" / OBJECT).read_bytes())
    if spoilt is None:
        objects.delete_object(Bucket=BUCKET, Key=f"gpt2/store/{OBJECT}")
    else:
        objects.put_object(Bucket=BUCKET, Key=f"gpt2/store/{OBJECT}", Body=spoilt)
    with pytest.raises(StoreError, match=OBJECT):
        prune(pruning(workplace, tmp_path / "out", store=URL))
    assert list(tmp_path.iterdir()) == []
    assert run_pipe(monkeypatch, "store", "verify", URL) == 3
    assert OBJECT in one_line(capsys)


@pytest.mark.usefixtures("standard_environment")
def test_a_store_without_a_sound_commit_record_is_refused(objects: Any) -> None:
    """Half an upload is incomplete; half a record is damaged."""
    record = f"gpt2/store/{COMMIT_KEY}"
    objects.put_object(Bucket=BUCKET, Key=record, Body=b'{"format": "gradpipe-commit-1"')
    with pytest.raises(StoreError, match="damaged"):
        GradientStore.open(URL)
    objects.delete_object(Bucket=BUCKET, Key=record)
    with pytest.raises(StoreError, match="incomplete"):
        GradientStore.open(URL)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/store", "no store at"),
        (f"s3://{BUCKET}/no/such/store", "no store at"),
        (f"s3://{BUCKET}/gpt2", "not a gradient store"),
        ("s3://no such bucket!/store", "Invalid bucket name"),
        ("memory://nowhere", "no store at"),
        ("file:///no/such/folder", "no store at"),
        ("gopher://host/store", "Protocol not known"),
    ],
)
@pytest.mark.usefixtures("standard_environment")
def test_a_url_without_a_store_is_the_users_mistake(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the URL and what is wrong, and exit code 2."""
    with pytest.raises(InputError, match=message):
        GradientStore.open(url)
    assert run_pipe(monkeypatch, "store", "verify", url) == 2
    assert url in one_line(capsys)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": "stranger"}, "Forbidden|does not exist"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "Forbidden|signature"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "credentials"),
        ({"AWS_PROFILE": "nobody"}, "profile"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "[Ii]nvalid"),
    ],
)
@pytest.mark.usefixtures("standard_environment")
def test_a_server_that_will_not_answer_is_named(
    variables: dict[str, str | None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong or missing credentials and endpoints end in one line, not in a traceback."""
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with enable_iam_authentication():
        with pytest.raises(InputError, match=message):
            GradientStore.open(URL)
        assert run_pipe(monkeypatch, "store", "verify", URL) == 2
    assert URL in one_line(capsys)


def test_options_that_the_file_system_does_not_know_are_the_users_mistake() -> None:
    """Whatever a backend raises, it comes as an InputError of one line."""
    with pytest.raises(InputError, match="nonsense"):
        GradientStore.open(URL, {**CREDENTIALS, "nonsense": 1})


@pytest.mark.usefixtures("endpoint")
def test_a_server_that_goes_away_fails_the_read() -> None:
    """What cannot be read is an error that names the object, never zeros."""
    server = ThreadedMotoServer("127.0.0.1", 0)  # shares the data of every moto server here
    server.start()
    host, port = server.get_host_and_port()
    options = {**CREDENTIALS, "endpoint_url": f"http://{host}:{port}"}
    store = GradientStore.open(URL, options)
    server.stop()
    with pytest.raises(GradpipeError, match="cannot read layers/"):
        store.read(store.spec.layers[0], ["grad_l1"])
