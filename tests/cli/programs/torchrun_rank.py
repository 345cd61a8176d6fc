"""`photon` as a rank that torchrun forked."""

from photon.cli.main import main

if __name__ == "__main__":
    main()
