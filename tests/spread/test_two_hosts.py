"""Two hosts: network namespaces of this machine with a cable between them, each with its own torchrun."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from spread.launch import SECONDS, SETTINGS, text_beside, train
from spread.test_spread_train import figures

pytestmark = pytest.mark.slow

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Make two network namespaces that reach each other and nothing else; return the name and interface of each."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: the program ip is missing")
    names = [f"fastgpt-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"fg{os.getpid() % 100000}v{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be made here ({e.stderr.strip()})")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def start(host: str, interface: str, number: int, *command: str) -> "subprocess.Popen[str]":
    """Run torchrun with one process on a host."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29512", "--rdzv-conf", f"is_host={1 - number}"]
    options += ["--local-addr", ADDRESSES[number]]
    run = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", *options, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    return subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_losses_over_two_hosts_are_those_of_one(hosts: list[tuple[str, str]], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--max-steps", "6", "--parallel", "fsdp")
    command = ["-m", "fastgpt.train", *SETTINGS, "--data", str(text_beside(two)), "--out", str(two), *more]
    started = [start(*host, number, *command) for number, host in enumerate(hosts)]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(itertools.chain(said))
    assert train(one, *more, count=2).returncode == 0
    assert figures(two) == figures(one), "as on one host, to the bit"
