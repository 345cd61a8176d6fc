"""The command line."""


def photon() -> None:
    """The script: its commands are imported when it is called, not by workers, who read it too."""
    from photon.cli.main import main

    main()
