"""Two hosts, as far as one machine can play them: two network namespaces and a cable between."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gradpipe import open_store

TIMEOUT = "15"  # seconds
IP = shutil.which("ip") or "ip"
ADDRESS = "10.213.77.{}"


def ip(*words: str) -> None:
    """Change the network."""
    subprocess.run([IP, *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, each with one end of a cable; skipped where they cannot be made."""
    names = (f"gp{os.getpid()}a", f"gp{os.getpid()}b")
    with ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            ends = ["link", "add", "cable", "netns", names[0], "type", "veth"]
            ip(*ends, "peer", "name", "cable", "netns", names[1])
            for number, name in enumerate(names, 1):
                inside = ("-n", name)
                ip(*inside, "address", "add", f"{ADDRESS.format(number)}/24", "dev", "cable")
                ip(*inside, "link", "set", "cable", "up")
                ip(*inside, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield names


def start(hosts: tuple[str, str], inputs: Path, store: Path) -> list[subprocess.Popen[str]]:
    """One collection, by a rank on each host."""
    command = [sys.executable, "-m", "gradpipe", "collect-grads", str(inputs / "model"), str(store)]
    command += ["--dataset", str(inputs / "text.txt"), "--num-samples", "64", "--seq-len", "64"]
    command += ["--encoding", "float32", "--schedule", "streamed", "--rank-timeout", TIMEOUT]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS.format(1), "MASTER_PORT": "29500"}
    meeting["GLOO_SOCKET_IFNAME"] = "cable"
    return [
        subprocess.Popen(
            [IP, "netns", "exec", name, *command],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(hosts)
    ]


@pytest.mark.slow
def test_a_cable_that_is_pulled_ends_both_hosts(
    hosts: tuple[str, str], inputs: Path, tmp_path: Path
) -> None:
    """No connection closes, no answer comes: both end with 75 in time; mended, they go on."""
    store = tmp_path / "store"
    ranks = start(hosts, inputs, store)
    while not (store / "partial" / "1-of-2.lock").exists():
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    for number, rank in enumerate(ranks):
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == 75, said
        assert f"pipe: rank {number}: another rank did not answer in {TIMEOUT} s: run the" in said
    ip("-n", hosts[0], "link", "set", "cable", "up")
    for rank in start(hosts, inputs, store):
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    assert open_store(store).spec.samples.num_samples == 64
