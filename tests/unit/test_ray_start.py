"""A Ray node listens on its own address alone; tests/cluster looks at the sockets of whole clusters."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.errors import EXIT_RUN_AGAIN, UserError
from lbr_dist.launch.ray_cluster import ALONE, _check_answers, check_python, cluster
from lbr_dist.launch.ray_start import address_towards, listening_on, run_driver, start

PROJECT = Path(__file__).parents[2]
ADDRESS = "127.0.0.9"
"""Of this machine, as any of 127.0.0.0/8."""
SOCKETS = """
import socket
for family, kind, address in [(2, 1, ''), (10, 1, '::'), (10, 1, '::ffff:0.0.0.0'), (2, 1, '127.0.0.1'), (2, 2, '')]:
    made = socket.socket(family, kind)
    if family == 10:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((address, 0))
    print(made.getsockname()[0])
"""


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node without a compiled library, and an environment that says nothing."""
    for name in ("CC", "LD_PRELOAD", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ALONE, "0")  # every address of these tests is loopback
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"lbr-ray-{os.getuid()}"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands that were to be run, with their environment."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def call(command: Sequence[str], env: dict[str, str]) -> int:
        calls.append((list(command), env))
        return 7

    monkeypatch.setattr(subprocess, "call", call)
    return calls


def test_every_interface_becomes_one_address(node: Path) -> None:
    env = {**os.environ, **listening_on(ADDRESS, os.environ)}
    found = subprocess.run([sys.executable, "-c", SOCKETS], env=env, capture_output=True, text=True, check=True)
    mapped = f"::ffff:{ADDRESS}"
    assert found.stdout.split() == [ADDRESS, mapped, mapped, "127.0.0.1", "0.0.0.0"]  # the last one is UDP
    (library,) = node.iterdir()
    before = library.stat()
    other = {**os.environ, "LD_PRELOAD": "libm.so.6"}
    assert listening_on("127.0.0.8", other) == {
        "LD_PRELOAD": f"{library}:libm.so.6",
        "LBR_NODE_ADDRESS": "127.0.0.8",
    }
    assert library.stat() == before, "compiled once"


CLIENTS = """
import asyncio, contextlib, socket

server = socket.create_server(("", 0), reuse_port=True)
port = server.getsockname()[1]
for family, address in [(2, "127.0.0.1"), (10, "::ffff:127.0.0.1")]:
    with socket.socket(family) as client:
        client.connect((address, port))
        print(server.accept()[0].getsockname()[0])
    with socket.socket(family) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((address, port))
        print(server.accept()[0].getsockname()[0])
own = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(own.getsockname()):
    print(own.accept()[0].getsockname()[0])
server.close()
async def refused():
    with contextlib.suppress(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
        return "open"
    return "refused"
print(asyncio.run(refused()))
"""


def test_what_looks_on_loopback_finds_it() -> None:
    """Blocking or not, by either family of sockets; what listens on loopback comes first, and what is shut stays so."""
    env = {**os.environ, **listening_on(ADDRESS, os.environ)}
    found = subprocess.run([sys.executable, "-c", CLIENTS], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [ADDRESS] * 4 + ["127.0.0.1", "refused"]


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler", "no C compiler: no-such-compiler"), ("false", "non-zero exit status 1")],
)
def test_without_a_compiler_the_token_guards(compiler: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert listening_on(ADDRESS, {**os.environ, "CC": compiler}) == {}
    assert "Ray listens on every interface" in caplog.text
    assert why in caplog.text


def test_a_library_that_does_not_work_here_is_not_relied_on(caplog: pytest.LogCaptureFixture) -> None:
    assert listening_on("::1", os.environ) == {}
    assert "a socket listens on 0.0.0.0 in spite of" in caplog.text


def test_a_folder_that_others_can_write_to_is_not_used(node: Path, caplog: pytest.LogCaptureFixture) -> None:
    node.mkdir()
    node.chmod(0o777)
    assert listening_on(ADDRESS, os.environ) == {}
    assert f"{node} is not this user's own folder" in caplog.text


def test_start(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    with pytest.raises(UserError, match="there is no token"):
        start(["--head", f"--node-ip-address={ADDRESS}"])
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/token")
    with pytest.raises(UserError, match="--node-ip-address: name the address of this node"):
        start(["--head"])
    with pytest.raises(UserError, match="head:x: not the HOST:PORT"):
        start(["--address", "head:x"])
    assert not started

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert start(["--head", "--node-ip-address", ADDRESS, "--num-cpus=1"]) == 7
    (command, env), = started  # fmt: skip
    assert command[3:] == ["start", "--disable-usage-stats", "--head", "--node-ip-address", ADDRESS, "--num-cpus=1"]
    assert env["LBR_NODE_ADDRESS"] == ADDRESS
    assert env["RAY_AUTH_MODE"] == "token"
    assert "RAY_ADDRESS" not in env

    assert start(["--address=127.0.0.1:6379"]) == 7
    assert started[1][0][-1] == "--node-ip-address=127.0.0.1"
    monkeypatch.setenv(ALONE, "1")
    with pytest.raises(UserError, match=f"set {ALONE}=0 here"):
        start(["--address=127.0.0.1:6379"])
    monkeypatch.setenv(ALONE, "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert start(["--address=127.0.0.1:6379"]) == 7
    assert started[2][1]["RAY_AUTH_MODE"] == "disabled"


def test_a_python_that_a_shell_would_split_is_refused(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    """Ray hands its path to one as it is: no worker ever came, and nobody said why."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/token")
    monkeypatch.setattr(sys, "executable", "/home/übung/my env/bin/python")
    with pytest.raises(UserError, match="my env/bin/python: Ray cannot start this Python"):
        start(["--head", f"--node-ip-address={ADDRESS}"])
    with pytest.raises(UserError, match="my env/bin/python: Ray cannot start this Python"), cluster():
        pass
    assert not started
    monkeypatch.setattr(sys, "executable", "/home/übung/env-3.11/bin/python")
    check_python()


def test_a_driver_begins_again_once(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, socket, sys\n"
        "from lbr_dist.launch.ray_start import keep_to_node_address\n"
        "print('begins', *sys.argv[1:], flush=True)\n"
        "keep_to_node_address()\n"
        "made = socket.create_server(('', 0))\n"
        "print(made.getsockname()[0])\n"
    )

    def run(address: str) -> list[str]:
        command = [sys.executable, "-W", "ignore", str(script), "a b"]
        env = {**os.environ, "RAY_ADDRESS": address}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()

    assert run("127.0.0.1:6379") == ["begins a b", "begins a b", "127.0.0.1"]
    for address in ("", "auto", "ray://127.0.0.1:10001"):
        assert run(address) == ["begins a b", "0.0.0.0"]


def test_the_address_that_faces_the_head() -> None:
    assert address_towards("127.0.0.1:6379") == "127.0.0.1"


@pytest.mark.parametrize("driver", ["stage1", "stage2", "pipeline", "prepare", "encode", "mine"])
def test_a_driver_whose_cluster_has_no_address_says_so_in_a_line(driver: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LBR_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, PROJECT / "ray_jobs" / f"{driver}.py", "recipe.yaml"],
        env=environ | {"RAY_ADDRESS": "no-such-host.invalid:6379", "PYTHONPATH": str(PROJECT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: RAY_ADDRESS no-such-host.invalid:6379: not the HOST:PORT of a head")
    assert done.stderr.count("\n") == 1


def test_a_driver_that_is_stopped_before_its_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise KeyboardInterrupt  # as Ctrl-C does while Ray starts

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_driver(main)
    assert ended.value.code == EXIT_RUN_AGAIN
    assert capsys.readouterr().err == "stopped on request; run again to go on\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_cluster_that_is_gone_is_not_waited_for(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray asks for three minutes; where something listens, it is Ray's turn."""
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would wait"))
    monkeypatch.setenv("RAY_ADDRESS", f"{host}:1")
    with pytest.raises(UserError, match=rf"RAY_ADDRESS {host}:1: no cluster answers there \({host}: Conn"), cluster():
        pass
    with socket.create_server(("127.0.0.1", 0)) as server:
        _check_answers(f"{host}:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["127.0.0.1", "http://127.0.0.1:8265", "https://head", "head:gcs", ":6379 "])
def test_an_address_that_is_none_is_said_in_a_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """http:// is what one exports for `ray job submit`."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"RAY_ADDRESS {address}: is no cluster's address: .* HOST:PORT"), cluster():
        pass


def test_a_local_cluster_that_is_asked_for_by_name_is_as_shut_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    seen: dict[str, str] = {}

    def init(address: str, **_: object) -> argparse.Namespace:
        seen.update(os.environ, given=address)
        return argparse.Namespace(dashboard_url="")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(os, "environ", {**os.environ, "RAY_ADDRESS": "local"})
    with cluster() as where:
        assert where == "this machine"
    assert seen["given"] == "local"
    assert seen["RAY_ADDRESS"].startswith("127.0.0.1:")
    assert seen["RAY_AUTH_MODE"] == "token"
    assert seen["RAY_AUTH_TOKEN_PATH"]


def test_a_cluster_of_another_version_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.11.7")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with (
        pytest.raises(UserError, match=r"another Ray or Python: .* Ray: 2.9.0"),
        cluster(),
    ):
        pass
