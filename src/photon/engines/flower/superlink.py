"""The superlink, as Flower makes it: `python -m photon.engines.flower.superlink ...`"""

from __future__ import annotations

from photon.engines.flower.pinned import check_flower


def main() -> None:
    """Run until told to stop. Arguments are flower-superlink's.

    Raises:
        DeployError: another version of Flower is installed.
    """
    check_flower()
    from flwr.superlink.cli.flower_superlink import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    main()
