"""The trainer as it is deployed: `python -m photon.silo`, killed, against a real desk and store.

Behind a real door: TLS by Caddy, grants by the desk, objects in SeaweedFS.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from forked_process import ForkedProcess

from photon.deploy.certificates import keep_certificate, keep_member_authority
from photon.deploy.desk import Desk
from photon.deploy.embedded_store import EmbeddedStore
from photon.deploy.front_door import DoorSettings, front_door
from photon.deploy.ports import free_ports
from photon.deploy.supervisor import Supervisor
from photon.errors import RunBusyError, WorkerLostError
from photon.federation.envelopes import Ask, parse_reply, sealed
from photon.link.parcel import update_keys
from photon.membership.invitation import certificate_fingerprint
from photon.membership.keys import NodeKey
from photon.membership.records import OpenTask
from photon.membership.roster import Facts, Roster
from photon.membership.signing import RECEIPT, verify_document
from photon.silo.desk_client import DeskClient
from photon.silo.service import only_trainer
from photon.silo.socket import ask_trainer

pytestmark = pytest.mark.slow

FORKED = Path(__file__).parent / "programs" / "forked_trainer.py"

#: A process imports PyTorch and transformers, on a machine that does other things as well.
START_S = 240.0


class World:
    """An aggregator's services, and a member's home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = keep_certificate(folder / "server", "127.0.0.1")
        self.ca = files.ca
        self.key = NodeKey.create(folder / "aggregator.key")
        self.store = EmbeddedStore(folder / "weed", min_free_gib=0.1, volume_mib=64)
        self.roster = Roster(folder / "members.sqlite")
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        presigner = self.store.presigner(f"https://{self.address}")
        members = keep_member_authority(folder / "server")
        audience = certificate_fingerprint(self.ca.read_text())
        self.desk = Desk(self.roster, presigner, audience=audience, authority=members)
        self.desk.start()
        self.door = front_door(
            DoorSettings(
                *("127.0.0.1", port, files.certificate, files.key, members / "ca.crt"),
                desk_port=self.desk.port,
                store_port=self.store.port,
            ),
            folder / "door",
        )

    def join(self, name: str, home: Path) -> None:
        home.mkdir(mode=0o700)
        key = NodeKey.create(home / "node.key")
        shutil.copy(self.ca, home / "ca.crt")
        facts = Facts("a" * 64, "b" * 64, 1000, "0.1.0")
        client = DeskClient(self.address, home / "ca.crt", key)
        client.join(self.roster.invite(name, 600.0), name, key.public_pem, facts)
        record = {
            "name": name,
            "address": self.address,
            "ca_fingerprint": certificate_fingerprint(self.ca.read_text()),
            "aggregator_key": self.key.public_pem,
        }
        (home / "membership.json").write_text(json.dumps(record))

    def open(self, ask: Ask) -> None:
        """Let the silo read the state and write its update, as an aggregator's engine does."""
        own = f"{ask.run.id}/silos/{ask.silo}/"
        self.roster.tasks.open(
            OpenTask(
                id=ask.task_id,
                run=ask.run.id,
                round=ask.round,
                silo=ask.silo,
                kind=ask.kind,
                opened_at=time.time(),
                until=time.time() + 600,
                most_bytes=100 << 20,
                readable=(f"{ask.run.id}/global/", own),
                writable=update_keys(own.rstrip("/"), ask.round, ask.silo),
            )
        )


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="photon-silo-"))  # unix sockets lie in it: a short path
    world = World(folder)
    with Supervisor(folder / "serve.json", folder / "logs", log=lambda _: None) as supervisor:
        # Its own way to stop takes a quarter of a minute.
        supervisor.start(replace(world.store.service(), stop_signal=signal.SIGKILL))
        supervisor.start(world.door)
        yield world
    world.desk.stop()
    shutil.rmtree(folder, ignore_errors=True)


class Trainer:
    """A home, and the process that works in it.

    With `forks` it is started anew by forking, after the first time; with `last_words_s`, then too:
    it has that long for them, however slow the machine is.
    """

    def __init__(
        self, world, name, data: str, *, node="", launcher=(), forks=None, last_words_s=None
    ) -> None:
        self.world, self.name, self.forks, self.last_words_s = world, name, forks, last_words_s
        self.home = world.folder / f"{name}-{time.monotonic_ns()}"
        world.join(name, self.home)
        text = f'[data]\npath = "{data}"\nsilo = "red"\n[disk]\nmin_free_gib = 0.1\n{node}'
        (self.home / "node.toml").write_text(text)
        self.launcher = launcher or (sys.executable, "-m")
        self.starts = 0
        self.process: subprocess.Popen | ForkedProcess | None = None

    @property
    def socket(self) -> Path:
        return self.home / "trainer.sock"

    @property
    def log(self) -> str:
        """Of the newest process."""
        return (self.home / f"log-{self.starts}").read_text()

    def start(self) -> None:
        self.starts += 1
        words = ["--home", str(self.home), "--site", str(self.home / "node.toml")]
        path = self.home / f"log-{self.starts}"
        with path.open("wb") as log:
            if self.forks and (self.starts > 1 or self.last_words_s):
                given = {"words": words, "out": str(path), "error": str(path)}
                given["last_words_s"] = self.last_words_s
                self.process = ForkedProcess(self.forks, FORKED, given)
            else:
                command = [*self.launcher, "photon.silo", *words]
                self.process = subprocess.Popen(
                    command, stderr=log, stdout=log, start_new_session=True
                )
        self.wait_for(lambda: "listening at" in self.log)

    def wait_for(self, condition: Callable[[], bool], seconds: float = START_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log[-3000:]
            assert self.process is None or self.process.poll() is None, self.log[-3000:]
            time.sleep(0.005)

    def creep(self, condition: Callable[[], bool], seconds: float = START_S) -> None:
        """Let the process run, a little at a time; when this returns it stands still.

        So nothing can happen between what was seen and what is done about it.
        """
        assert self.process is not None
        end = time.monotonic() + seconds
        while True:
            os.kill(self.process.pid, signal.SIGSTOP)
            while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
                time.sleep(0.0002)
            if condition():
                return
            assert time.monotonic() < end, self.log[-3000:]
            os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(0.001)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL

    def end(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(10)


@pytest.fixture
def make_trainer(world) -> Iterator[Callable[..., Trainer]]:
    made = []

    def make(*arguments, **options) -> Trainer:
        made.append(Trainer(world, *arguments, **options))
        return made[-1]

    yield make
    for trainer in made:
        if trainer.process is not None:
            trainer.end()


class Asking(threading.Thread):
    """The courier's part: asks, over as many restarts as it takes."""

    def __init__(self, trainer: Trainer, ask: Ask) -> None:
        super().__init__(daemon=True)
        trainer.world.open(ask)
        self._socket, self.answer = trainer.socket, None
        self._message = sealed(ask, trainer.world.key)
        self.start()

    def run(self) -> None:
        # A test may be over, and its trainer killed, before anybody answers.
        with contextlib.suppress(WorkerLostError):
            self.answer = ask_trainer(self._socket, self._message, within_s=START_S)

    def result(self):
        self.join(START_S)
        assert self.answer is not None
        return self.answer


@pytest.fixture
def remote(world, make_aggregator):
    """An aggregator whose states lie in the world's store, and who asks one member."""

    def make(silo: str, *overrides: str, run_id: str):
        aggregator = make_aggregator(*overrides, run_id=run_id, store=world.store.open())
        aggregator.run = aggregator.run.model_copy(update={"silos": [silo]})
        return aggregator

    return make


def reply_of(world, silo, answer):
    """What was answered, once its signature is found to hold."""
    verify_document(world.roster.member(silo).public_key, RECEIPT, answer.text, answer.signature)
    return parse_reply(answer.text)


def place_of(trainer: Trainer, ask: Ask) -> Path:
    return trainer.home / "answers" / ask.run.id / f"{ask.kind}-{ask.round:06d}"


def answered(trainer: Trainer, ask: Ask) -> bool | None:
    """Whether an answer on disk has been sent; None while there is none."""
    path = place_of(trainer, ask) / "answer.json"
    return json.loads(path.read_text())["sent"] if path.exists() else None


def parcel_begun(trainer: Trainer, ask: Ask) -> bool:
    parcel = place_of(trainer, ask) / "parcel"
    return any(path.is_file() for path in parcel.rglob("*")) if parcel.exists() else False


STEPS = ("local.steps=6", "federation.optimizer_state=keep")


def test_killed_at_any_moment_it_comes_to_the_same_update(
    world, make_trainer, remote, three_silos, tmp_path, forks
):
    aggregator = remote("red", *STEPS, run_id="a" * 32)
    alone = aggregator.node(tmp_path / "alone")
    node = "[compute]\nthreads = 1\n"
    trainer = make_trainer("red", str(three_silos), node=node, forks=forks)
    ask = aggregator.fit("red")
    _, expected = aggregator.expected(alone, ask)
    asking = Asking(trainer, ask)

    trainer.start()
    trainer.creep(lambda: parcel_begun(trainer, ask))
    assert "step 6:" in trainer.log
    assert answered(trainer, ask) is None
    trainer.kill()  # while the update is written to its disk

    trainer.start()
    trainer.creep(lambda: answered(trainer, ask) is not None)
    assert "step 6:" in trainer.log
    assert answered(trainer, ask) is False
    assert aggregator.store.size(expected.key) is None
    assert asking.answer is None
    trainer.kill()  # while it is sent

    trainer.start()
    reply = reply_of(world, "red", asking.result())
    assert "step 1:" not in trainer.log  # it was trained; only sent again
    assert reply.fit.update == expected
    assert aggregator.store.size(expected.key) == expected.bytes
    assert world.roster.presences()["red"][0].task in ("", ask.task_id)

    # The next round goes on from what it kept, killed once more in the middle.
    aggregator.move()
    second = aggregator.fit("red", number=2, node_round=1)
    _, expected = aggregator.expected(alone, second)
    asking = Asking(trainer, second)
    trainer.creep(lambda: "round 2, step 2:" in trainer.log)
    presence = world.roster.presences()["red"][0]
    trainer.kill()
    assert presence.task in ("", second.task_id)  # "": its word was still on its way
    trainer.start()
    assert reply_of(world, "red", asking.result()).fit.update == expected

    # And the first answer is still the first answer, to the byte.
    again = Asking(trainer, ask).result()
    assert reply_of(world, "red", again) == reply
    assert again.text == Asking(trainer, ask).result().text


def test_it_ends_soon_when_told_to_and_says_so(world, make_trainer, remote, three_silos, forks):
    steps = ("local.steps=300", "federation.optimizer_state=keep", "federation.rounds=5")
    aggregator = remote("green", *steps, run_id="b" * 32)
    node = "[compute]\nthreads = 1\n"
    data = str(three_silos)
    trainer = make_trainer("green", data, node=node, forks=forks, last_words_s=20.0)
    trainer.start()
    # A task that the aggregator has not opened: the desk gives no grants, and the words arrive.
    stray = aggregator.fit("green", number=5)
    answer = ask_trainer(trainer.socket, sealed(stray, world.key), within_s=START_S)
    refused = reply_of(world, "green", answer).refused
    assert refused.code == 76

    asking = Asking(trainer, aggregator.fit("green"))
    trainer.wait_for(lambda: "step 1:" in trainer.log)
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(60) == 0
    told_by = time.monotonic() + 20  # the desk writes it down a moment later
    while world.roster.presences()["green"][0].state != "stopping":
        assert time.monotonic() < told_by
        time.sleep(0.05)
    assert not trainer.socket.exists()
    assert asking.answer is None  # the next one has it to give
    # What `photon join` shows of it; the steps go on in place.
    said = [line for line in trainer.log.splitlines() if line.startswith("@screen ")]
    for words in (
        "round 5: this site refuses the task: ",
        "warning: a round may merge ",
        "round 1: trains, 300 steps",
    ):
        assert any(line.removeprefix("@screen ").startswith(words) for line in said), said
    assert "@live round 1: step 1 of 300: loss " in trainer.log


def free(home: Path) -> bool:
    """Whether no trainer works in a home."""
    try:
        with only_trainer(home):
            return True
    except RunBusyError:
        return False


MUON = ("local.optimizer=muon", "local.lr=1e-2", "federation.optimizer_state=keep")


@pytest.mark.parametrize("name", ["self-started", "torchrun"])
def test_a_node_of_two_ranks_goes_from_run_to_run(
    name, world, make_trainer, remote, three_silos, tmp_path
):
    """However its ranks were started. One that is lost ends all, and the task is done again."""
    launcher = ()
    if name == "torchrun":
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
        launcher = (*launcher, f"--master-port={free_ports(1)[0]}", "-m")
    node = '[compute]\nthreads = 1\nprocesses = 2\nstrategy = "ddp"\n'
    trainer = make_trainer(name, str(three_silos), node=node, launcher=launcher)
    trainer.start()
    letter = {"self-started": "c", "torchrun": "d"}[name]
    for number, recipe in enumerate(((), MUON)):
        aggregator = remote(name, *recipe, run_id=f"{number}" * 31 + letter)
        ask = aggregator.fit(name)
        alone = aggregator.node(tmp_path / f"alone-{number}", name)
        receipt, _ = aggregator.expected(alone, ask)
        first = reply_of(world, name, Asking(trainer, ask).result())
        assert first.fit is not None, first.refused
        assert first.fit.tokens == receipt.tokens
        assert first.fit.loss == pytest.approx(receipt.loss, rel=1e-4)
        score = aggregator.evaluation(name)
        scored = reply_of(world, name, Asking(trainer, score).result())
        expected = aggregator.score(alone, name)
        assert scored.evaluate.loss == pytest.approx(expected.loss, rel=1e-5)
        assert scored.evaluate.tokens == expected.tokens
    assert trainer.log.count(", ddp: ") == 2
    if name == "torchrun":
        # Its launcher killed, no rank is left to hold the home.
        trainer.kill()
        end = time.monotonic() + 20
        while not free(trainer.home):
            assert time.monotonic() < end
            time.sleep(0.05)
        return
    second = aggregator.fit(name, number=2, node_round=1)
    asking = Asking(trainer, second)
    trainer.wait_for(lambda: "round 2, step 1:" in trainer.log)
    os.kill(int(trainer.log.split("rank 1 of 2 is process ")[1].split()[0]), signal.SIGKILL)
    assert trainer.process.wait(60) != 0
    assert asking.answer is None
    trainer.start()
    reply = reply_of(world, name, asking.result())
    assert reply.fit is not None, reply.refused
    assert reply_of(world, name, Asking(trainer, ask).result()) == first
