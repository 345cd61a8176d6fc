"""The ServerApp of a served run: `app` is what the bundle names, and superexec starts."""

from __future__ import annotations

from photon.engines.flower.post import FlowerPost
from photon.engines.flower.server_app import make_app, run_folder
from photon.runs.serving import continue_run


def _continue(post: FlowerPost) -> None:
    continue_run(run_folder(), post)


app = make_app(_continue)
