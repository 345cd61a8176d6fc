"""Scalars for TensorBoard: RUN/tensorboard, written with the `tensorboard` package alone.

Two TensorBoard runs: `.` has the global step on its x axis, `by_tokens` the tokens trained on so
far. A process that takes a run up again opens a new file that begins by taking back every step
after the checkpoint, so that no step shows twice.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from photon.telemetry import events

BY_TOKENS = "by_tokens"


class TensorBoardWriter:
    """A listener that writes scalars as events come in.

    Tags, x axis global step: train/loss/SILO, train/gradient_norm/SILO, train/tokens_per_s/SILO,
    train/lr, eval/{loss,perplexity,bits_per_byte} and eval/perplexity/SILO, round/*, time/*,
    total/*. In `by_tokens`, x axis tokens: eval_by_tokens/*.

    Args:
        folder: made at the first figure; RUN/tensorboard by convention.
    """

    def __init__(self, folder: Path) -> None:
        # A second of imports, taken before the run's clock starts rather than at its first event.
        importlib.import_module("tensorboard.compat.proto.event_pb2")
        importlib.import_module("tensorboard.summary.writer.record_writer")
        self._folder = Path(folder)
        self._files: dict[str, _EventFile] = {}
        self._local_steps = 1
        self._resumed_from: int | None = None
        self._lr_step = -1
        self._evaluations: list[events.Evaluated] = []

    def on_event(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self.close()
                self._local_steps = event.local_steps
                self._resumed_from = event.resumed_from_round
            case events.RoundStarted():
                self._step(event.global_step, {"round/participants": len(event.participants)})
            case events.LocalProgress(silo=silo):
                scalars = _tagged(
                    event, "train/{}/" + silo, "loss", "gradient_norm", "tokens_per_s"
                )
                if event.global_step > self._lr_step:
                    # The server owns the clock: every silo has the same learning rate at a step.
                    self._lr_step = event.global_step
                    scalars["train/lr"] = event.lr
                self._step(event.global_step, scalars)
            case events.LocalFinished(silo=silo):
                scalars = {
                    f"round/train_loss/{silo}": event.loss,
                    f"round/update_norm/{silo}": event.update_norm,
                }
                self._step(event.round * self._local_steps, scalars)
            case events.RoundMerged():
                scalars = _tagged(event, "round/{}", "train_loss", "pseudo_gradient_norm")
                self._step(event.round * self._local_steps, scalars)
            case events.Evaluated():
                self._evaluations.append(event)
                self._step(event.round * self._local_steps, _scores(event, "eval"))
                if event.round == 0:
                    self._write_evaluations_by_tokens(0, purge_from=None)
            case events.RoundFinished():
                self._round_finished(event)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files, self._evaluations = {}, []

    def _round_finished(self, event: events.RoundFinished) -> None:
        scalars = _tagged(event, "round/{}", "bytes_up", "bytes_down", "tokens")
        scalars["round/dropped"] = len(event.dropped)
        for total in ("total_tokens", "total_bytes_up", "total_bytes_down"):
            scalars[total.replace("_", "/", 1)] = getattr(event, total)
        seconds = ("round_s", "local_train_s", "eval_s", "merge_s", "checkpoint_s")
        scalars |= _tagged(event, "time/{}", *seconds)
        self._step(event.global_step, scalars)
        # Only now are the tokens before this round known, and so where a resume takes back.
        before = event.total_tokens - event.tokens
        purge_from = None if self._resumed_from is None else before + 1
        self._write_evaluations_by_tokens(event.total_tokens, purge_from)

    def _step(self, global_step: int, scalars: Mapping[str, float | None]) -> None:
        resumed = self._resumed_from
        purge_from = None if resumed is None else resumed * self._local_steps + 1
        self._file(".", purge_from).write(global_step, scalars)

    def _write_evaluations_by_tokens(self, tokens: int, purge_from: int | None) -> None:
        file = self._file(BY_TOKENS, purge_from)
        for event in self._evaluations:
            file.write(tokens, _scores(event, "eval_by_tokens"))
        self._evaluations = []

    def _file(self, name: str, purge_from: int | None) -> _EventFile:
        if name not in self._files:
            self._files[name] = _EventFile(self._folder / name, purge_from)
        return self._files[name]


def _tagged(event: events.Event, tag: str, *figures: str) -> dict[str, float | None]:
    """Figures of an event, each under a tag that has its name in the place of {}."""
    return {tag.replace("{}", figure, 1): getattr(event, figure) for figure in figures}


def _scores(event: events.Evaluated, prefix: str) -> dict[str, float | None]:
    if event.silo is not None:
        return {f"{prefix}/perplexity/{event.silo}": event.perplexity}
    return _tagged(event, prefix + "/{}", "loss", "perplexity", "bits_per_byte")


class _EventFile:
    """One events.out.tfevents file, in TensorFlow's record format.

    Args:
        folder: TensorBoard calls each such folder a run.
        purge_from: first step of earlier files that readers must forget; None forgets nothing.
    """

    def __init__(self, folder: Path, purge_from: int | None) -> None:
        # Not everybody writes TensorBoard files, so not at the top.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # protobuf makes its classes at import, where a type checker does not look.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter((folder / _next_name(folder)).open("xb"))
        self._add(file_version="brain.Event:2")
        if purge_from is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=purge_from, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        told = {tag: value for tag, value in scalars.items() if value is not None}
        value = self._summaries.Summary.Value
        values = [value(tag=tag, simple_value=figure) for tag, figure in told.items()]
        self._add(step=step, summary=self._summaries.Summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()  # a killed run keeps what it told


def _next_name(folder: Path) -> str:
    """A file name that sorts after those already there, as readers take files by name."""
    stamps = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)
    stamp = max(int(time.time()), newest + 1)
    return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
