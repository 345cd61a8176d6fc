"""Change a roster and an audit log without end: `fill.py ROSTER LOG`; says each number when done.

Each number is written to both before it is said, so whoever kills this knows what must be there.
"""

import itertools
import sys

from photon.membership.audit import AuditLog
from photon.membership.records import OpenTask, SignedReply
from photon.membership.roster import Roster

roster, log = Roster(sys.argv[1]), AuditLog(sys.argv[2])
for number in itertools.count():
    task = OpenTask(f"task-{number}", "r", number, "lab", "fit", 0.0, 1e12, 1, (), ())
    roster.tasks.open(task)
    roster.tasks.close(task.id, SignedReply(task.id, b"x" * 2000, "c2ln", "sha256:0"))
    log.append("number", {"number": number, "filling": "x" * 2000})
    print(number, flush=True)
