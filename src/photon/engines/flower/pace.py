"""How often the programs of this folder ask, and how soon one that says nothing is given up.

Flower's own figures make a round trip take 5 to 9 s and a lost process 60 s. They are constants in
its modules, set anew here for our own processes only; what both sides of a wire agree on is told
over that wire (a node's heartbeat interval) or lies in one process (the rest).
"""

from __future__ import annotations

#: Flower gives up whoever missed so many heartbeats in a row.
PATIENCE = 2

#: Supernode to superlink, s; 10 is the least the superlink takes. Silent for 20 s: offline.
NODE_HEARTBEAT_S = 10

#: Shim to supernode, s: a shim silent for 6 s has lost its task. Lost by mistake, it is asked for
#: again, and the trainer, which does not notice, answers it then.
TASK_HEARTBEAT_S = 3

#: The shim's heartbeats come this often, s, so that one that is late is no loss.
SHIM_BEAT_S = 1.0

#: Shim to supernode: is there a task? s. Both are on one machine. The long one while the shim has a
#: task: there is another only where the supernode gave that one up.
SHIM_POLL_S = 0.2
BUSY_SHIM_POLL_S = 1.0

#: Superexec to superlink: is there a run to start? s. It looks after its ServerApp as often.
SUPEREXEC_POLL_S = 1.0

#: Supernode to superlink: is there a task? s; the short one for `LIVELY_S` after the last task, as
#: an evaluation follows a round. A question costs the superlink some 10 ms of a core (it writes to
#: its database), and a node that works on a task asks none: 50 idle silos take a quarter of a core.
QUICK_POLL_S = 0.3
IDLE_POLL_S = 2.0
LIVELY_S = 60.0

#: Supernode, to its own memory: has the shim answered? s
ANSWER_POLL_S = 0.1

#: The longest wait between two attempts to reach a superlink that is away, s. Flower's own: 20.
RETRY_S = 4

#: A message is announced before its parts are there; who waits for them asks anew after this, s,
#: and later, at most every so many s, and gives up after so long. Flower's own: 1, 10 and 7200 s.
PART_FIRST_S = 0.05
PART_LAST_S = 0.5
PARTS_S = 10.0

#: After a shim was given up, the supernode must ask for tasks again within so long, s.
HUNG_S = 6.0
