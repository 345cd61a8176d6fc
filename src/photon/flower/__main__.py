"""`python -m photon.flower`: prints the folder of the app that `flwr run` submits."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).with_name("app"))  # noqa: T201
