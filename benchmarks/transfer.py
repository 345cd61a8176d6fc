"""Transfer between two network namespaces of a given rate, delay and loss: Photon against iperf3.

    .venv/bin/python benchmarks/transfer.py [--cells 200/100/0,1000/10/0.5] [--out FILE.md]
    .venv/bin/python benchmarks/transfer.py --quick

Needs root, and Debian's packages iproute2, procps and iperf3. A cell is Mbit/s / RTT in ms / loss
in %; half of the RTT is added on each side, the loss and the rate hold each way. Per cell, in the
same minutes, the same bytes go over the same link by (a) N parallel iperf3 TCP streams from the
silo to the aggregator, (b) Photon's own transfer over N connections: presigned PUTs of chunks to a
SeaweedFS in the aggregator's namespace, then GETs of them, (c) one PUT over one connection.

The link is a veth pair under tc netem. A kernel without netem gets two tun devices instead and a
relay in user space between them, which queues, delays and drops segments as netem would; the table
says which of them it was. A cell without delay and loss, such as 1000/0/0, is a veth pair under tc
tbf everywhere, which takes no processor from both ends. Everything is taken down at the end, also
after an error or Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deployment.links import child, inside, ip
from deployment.pair import (
    AGGREGATOR,
    MTU,
    Cell,
    Namespaces,
    congestion_control,
    has_netem,
    link,
)

#: Its sockets lie in /tmp by their ports, so another SeaweedFS here must have others.
STORE_PORT = 10_000 + os.getpid() % 1000 * 4
#: As large as Photon's own, unless that makes fewer than four for each stream.
CHUNK_BYTES = 16 * 2**20
#: Of iperf3's throughput.
ENOUGH = 0.8
#: A single stream may be far slower than the link: it is cut off then, and judged by what arrived.
SINGLE_LIMIT_S = 40.0
TOOLS = {"ip": "iproute2", "tc": "iproute2", "sysctl": "procps", "iperf3": "iperf3"}


CELLS = [
    Cell(rate, rtt_ms / 1e3, percent / 100)
    for rate in (50, 200, 1000)
    for rtt_ms in (10, 100, 200)
    for percent in (0, 0.5)
]


def this_script(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


# ---- the store and the contestants


@contextlib.contextmanager
def store(names: Namespaces) -> Iterator[tuple[dict[str, Any], int]]:
    """SeaweedFS in the aggregator's namespace, with its data in a scratch folder.

    Gives what S3Presigner needs to know about it, and its process.
    """
    from photon.deploy.embedded_store import memory_mib

    with tempfile.TemporaryDirectory(prefix="photon-transfer-") as scratch:
        folder = Path(scratch)
        access = {"access_key_id": secrets.token_hex(10), "secret": secrets.token_hex(20)}
        place = {"endpoint": f"http://{AGGREGATOR}:{STORE_PORT + 3}", "bucket": "photon"}
        place |= {"region": "us-east-1", **access}
        keys = [{"accessKey": access["access_key_id"], "secretKey": access["secret"]}]
        identity = {"name": "benchmark", "credentials": keys, "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        parts = zip(
            ("master", "volume", "filer", "s3"), range(STORE_PORT, STORE_PORT + 4), strict=True
        )
        command = [
            *(str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}"),
            *(f"-ip={AGGREGATOR}", f"-ip.bind={AGGREGATOR}"),
            *(f"-{part}.port={port}" for part, port in parts),
            *("-master.telemetry=false", "-master.electionTimeout=1s", "-volume.max=0"),
            *("-filer.disableHttp", f"-filer.localSocket={folder}/filer.sock"),
            *("-s3", f"-s3.config={folder}/s3.json", f"-s3.localSocket={folder}/s3.sock"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        ]
        log = folder / "log.txt"
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("w", encoding="utf-8"))
            limit = f"{memory_mib()}MiB"  # as `photon serve` starts it
            options = {"cwd": folder, "env": os.environ | {"GOMEMLIMIT": limit}}
            command = inside(names.aggregator, *command)
            server = stack.enter_context(child(command, stdout=output, stderr=output, **options))
            try:
                play(names.aggregator, "bucket", first_requests(place))
            except subprocess.CalledProcessError:
                tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise SystemExit(f"SeaweedFS did not come up:\n{tail}") from None
            yield place, server.pid


def first_requests(place: dict[str, Any]) -> dict[str, Any]:
    """URL, headers and body of two PUTs: of the bucket, of an object."""
    from photon.store.presign import S3Presigner

    presigner = S3Presigner(**place)
    bucket = presigner.bucket_request("PUT", 600)
    one = presigner.grant("PUT", "first", 600, 1, sha256(b"1").hexdigest())
    return {"bucket": [bucket.url, {}, ""], "object": [one.url, dict(one.headers), "1"]}


def play(namespace: str, role: str, task: dict[str, Any]) -> dict[str, float]:
    """What a run of this script in a namespace prints."""
    command = inside(namespace, *this_script("--role", role, "--task", json.dumps(task)))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def make_bucket(task: dict[str, Any]) -> dict[str, float]:
    """Wait for the store, then make the bucket and see that it takes an object."""
    deadline = time.monotonic() + 60
    while True:
        try:
            made, wrote = (request(*task[what]) for what in ("bucket", "object"))
            if made in (200, 409) and wrote in (200, 412):
                return {}
            problem = f"{made}, {wrote}"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise SystemExit(f"the store does not take objects: {problem}")
        time.sleep(0.2)


def request(url: str, headers: dict[str, str], body: str) -> int:
    """The status of the answer to a PUT on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        connection.request("PUT", f"{parts.path}?{parts.query}", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def random_chunks(count: int, chunk_bytes: int) -> list[memoryview]:
    import numpy as np

    data = memoryview(np.random.default_rng().bytes(count))
    return [data[start : start + chunk_bytes] for start in range(0, count, chunk_bytes)]


def run_photon(task: dict[str, Any]) -> dict[str, float]:
    """Send chunks with Photon's transfer, then fetch them over new connections."""
    from photon.store import granted_store
    from photon.store.granted_store import GrantedStore
    from photon.store.presign import S3Presigner
    from photon.store.transfer import Transfer, Wanted

    chunks = random_chunks(task["bytes"], task["chunk_bytes"])
    wanted = [Wanted(hexes(chunk), len(chunk), hexes(chunk)) for chunk in chunks]
    # In the clear, which a node refuses over a network: both ends of this one are on this machine.
    granted_store.is_loopback = lambda _: True
    presigner = S3Presigner(**task["store"])

    def transfer() -> Transfer:
        granted = GrantedStore(
            lambda verb, key, *what: presigner.grant(verb, key, 3600, *what),
            task["store"]["endpoint"],
            allowed=[AGGREGATOR],
        )
        return Transfer(granted, streams=task["streams"])

    sender, fetcher = transfer(), transfer()
    keys = [one.key for one in wanted]
    put = timed("put", lambda: sender.send(zip(keys, chunks, strict=True)), task)
    get = timed("get", lambda: sum(len(data) for data in fetcher.fetch(wanted)), task)
    return put | get | {"retries": sender.retries + fetcher.retries}


def timed(name: str, work: Callable[[], object], task: dict[str, Any]) -> dict[str, float]:
    """Bytes/s, and the CPU seconds of this process, of the store and of the relay meanwhile."""
    processes = {"sender": os.getpid()} | task["processes"]
    before = {who: cpu_s(pid) for who, pid in processes.items()}
    started = time.perf_counter()
    work()
    rate = task["bytes"] / (time.perf_counter() - started)
    spent = {f"{name}_cpu_s_{who}": cpu_s(pid) - before[who] for who, pid in processes.items()}
    return {name: rate} | {who: round(seconds, 2) for who, seconds in spent.items()}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def hexes(chunk: memoryview) -> str:
    return sha256(chunk).hexdigest()


def run_single(task: dict[str, Any]) -> dict[str, float]:
    """One PUT over one connection, cut off after a while."""
    from photon.store.presign import S3Presigner

    (data,) = random_chunks(task["bytes"], task["bytes"])
    key = f"single-{secrets.token_hex(8)}"
    grant = S3Presigner(**task["store"]).grant("PUT", key, 3600, len(data), hexes(data))
    parts = urlsplit(grant.url)
    started = time.perf_counter()
    connection = http.client.HTTPConnection(parts.netloc, timeout=120)
    connection.putrequest("PUT", f"{parts.path}?{parts.query}")
    for name, value in grant.headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    at, step = 0, 2**18
    while at < len(data) and time.perf_counter() - started < SINGLE_LIMIT_S:
        connection.send(data[at : at + step])
        at += step
    if at < len(data):
        arrived = at - unacknowledged(connection.sock)
    else:
        arrived = len(data)
        status = connection.getresponse().status
        if status != 200:
            raise SystemExit(f"The store answers {status} to a PUT.")
    return {"single": arrived / (time.perf_counter() - started)}


def unacknowledged(connection: socket.socket) -> int:
    """Bytes that the kernel still has to send, or to see acknowledged."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]


@contextlib.contextmanager
def iperf_server(names: Namespaces) -> Iterator[None]:
    command = inside(names.aggregator, "iperf3", "-s", "-B", AGGREGATOR, "--forceflush")
    with child(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        if not any("listening" in line for line in server.stdout):
            raise SystemExit("iperf3 does not listen.")
        yield


def run_iperf(names: Namespaces, payload: int, streams: int) -> dict[str, float]:
    """What arrives at the aggregator."""
    command = ["iperf3", "-c", AGGREGATOR, "-P", str(streams), "-n", str(payload), "-J"]
    command = inside(names.silo, *command)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout)
    if "error" in told:
        raise SystemExit(f"iperf3: {told['error']}")
    return {"iperf": told["end"]["sum_received"]["bits_per_second"] / 8}


# ---- cells, and the table of them


def payload_of(cell: Cell, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes for about options.seconds, and of one chunk: at least four for each stream."""
    rate = cell.mbit_per_s * 1e6 / 8
    if cell.loss and congestion_control() != "bbr":
        # Mathis et al. 1997, "The macroscopic behavior of the TCP congestion avoidance algorithm".
        rate = min(rate, options.streams * 1.22 * (MTU - 52) / (cell.rtt_s * cell.loss**0.5))
    count = options.payload_bytes or rate * options.seconds
    chunk = min(CHUNK_BYTES, int(count / (4 * options.streams)))
    return chunk * round(count / chunk), chunk


def measure(cell: Cell, netem: bool, options: argparse.Namespace) -> list[dict[str, float]]:
    """Bytes/s of everyone, for each repeat."""
    payload, chunk = payload_of(cell, options)
    repeats = options.repeats or (2 if cell.loss else 1)
    results = []
    with link(cell, netem) as names, iperf_server(names), store(names) as (place, pid):
        processes = {"store": pid} | ({"relay": names.relay} if names.relay else {})
        task = {
            "store": place,
            "processes": processes,
            "bytes": payload,
            "chunk_bytes": chunk,
            "streams": options.streams,
        }
        turns = [
            lambda: run_iperf(names, payload, options.streams),
            lambda: play(names.silo, "photon", task),
            lambda: play(names.silo, "single", task),
        ]
        for repeat in range(repeats):
            told: dict[str, float] = {}
            # Who goes first alternates, so that a drift of the machine favours nobody.
            for turn in turns[::-1] if repeat % 2 else turns:
                told |= turn()
            results.append(told)
            print(f"  {told}", file=sys.stderr)
    return results


HEAD = (
    *("Mbit/s", "RTT ms", "loss %", "MB", "iperf3", "Photon PUT", "of iperf3"),
    *("Photon GET", "of iperf3", "one PUT", "verdict"),
)


def row(cell: Cell, results: list[dict[str, float]], payload: int) -> tuple[str, ...]:
    """Medians, and medians of the ratios within each repeat."""

    def mbit(key: str) -> str:
        return f"{statistics.median(one[key] for one in results) * 8e-6:,.1f}"

    def ratio(key: str) -> float:
        return statistics.median(one[key] / one["iperf"] for one in results)

    return (
        *(f"{cell.mbit_per_s:g}", f"{cell.rtt_s * 1e3:g}", f"{cell.loss * 100:g}"),
        *(f"{payload / 1e6:.0f}", mbit("iperf")),
        *(mbit("put"), f"{ratio('put'):.2f}", mbit("get"), f"{ratio('get'):.2f}"),
        *(mbit("single"), "PASS" if ratio("put") >= ENOUGH else "FAIL"),
    )


def compare(netem: bool, options: argparse.Namespace) -> list[tuple[str, ...]]:
    rows = []
    for number, cell in enumerate(options.cells, 1):
        payload, _ = payload_of(cell, options)
        repeats = options.repeats or (2 if cell.loss else 1)
        print(
            f"cell {number} of {len(options.cells)}: {cell}; {payload / 1e6:.0f} MB each by "
            f"iperf3, Photon PUT and GET, one PUT; {repeats} x, about "
            f"{10 + repeats * (6 + 4 * min(options.seconds, payload * 1e-5)):.0f} s",
            file=sys.stderr,
        )
        rows.append(row(cell, measure(cell, netem, options), payload))
    return rows


def require_means() -> None:
    """Exit, with words, where this can't run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SystemExit("Needs root on Linux: it makes network namespaces.")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        raise SystemExit(f"Needs {', '.join(missing)}: apt-get install {packages}")
    name = f"photon-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        raise SystemExit("Needs network namespaces, which this machine refuses.")
    ip("netns", "del", name)
    if not has_netem() and not Path("/dev/net/tun").exists():
        raise SystemExit("Needs netem in the kernel, or /dev/net/tun.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells",
        type=lambda text: [Cell.parse(one) for one in text.split(",")],
        default=CELLS,
        help="Mbit/s / RTT in ms / loss in %%, comma-separated: 200/100/0,50/10/0.5",
    )
    parser.add_argument("--streams", type=int, default=8, help="of iperf3 and of Photon")
    parser.add_argument("--seconds", type=float, default=10, help="that each transfer takes, about")
    parser.add_argument("--repeats", type=int, help="default: 1, or 2 for a cell with loss")
    parser.add_argument("--relay", action="store_true", help="not netem, even if there is one")
    parser.add_argument("--quick", action="store_true", help="4 MB once, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.payload_bytes = None
    if options.quick:
        options.cells, options.repeats = [Cell(200, 0.01, 0.0)], 1
        options.payload_bytes = 4_000_000
    return options


ROLES = {"bucket": make_bucket, "photon": run_photon, "single": run_single}


def main() -> None:
    options = parse_arguments()
    if options.role:
        print(json.dumps(ROLES[options.role](options.task)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    require_means()
    # Imports torch, which the parts that this script plays in namespaces don't wait for.
    from trainer import machine, table

    netem = has_netem() and not options.relay
    rows = compare(netem, options)
    shaped = "tc netem" if netem else "a relay in user space (not netem)"
    how = " and ".join(sorted({"tc tbf" if one.only_rate else shaped for one in options.cells}))
    text = (
        f"# Transfer over {how}, {machine()}\n\n"
        f"Mbit/s of payload, {options.streams} streams (one PUT: 1), TCP {congestion_control()}, "
        f"MTU {MTU}. Half the RTT is added on each side; rate and loss hold each way; the queue "
        "holds one RTT, at least 20 ms. iperf3: what arrives, from silo to aggregator. Photon: "
        "from the first connection to the last answer. Verdict: PUT over iperf3 at least "
        f"{ENOUGH}.\n\n{table(HEAD, rows)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
