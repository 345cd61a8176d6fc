"""Redeem an invitation when told to: `redeem.py ROSTER TOKEN NAME`, then a line on stdin."""

import sys
import tempfile
from pathlib import Path

from photon.errors import InvitationError
from photon.membership.keys import NodeKey
from photon.membership.roster import Facts, Roster

path, token, name = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    key = NodeKey.create(Path(folder) / "key")
print("ready", flush=True)
sys.stdin.readline()
with Roster(path) as roster:
    try:
        roster.redeem(token, name, key.public_pem, Facts("d" * 64, "e" * 64, 1, "0.1.0"))
        print("joined", key.fingerprint)
    except InvitationError as error:
        print("refused", error.message)
