"""Flower carries tasks to silos and answers back. The only folder that imports flwr.

Imports nothing; take what you need from its module. On the aggregator: `commands` (command lines
for a supervisor; no flwr), `control` (register keys; start, stop and list runs), `bundle`, `post`,
`server_app`; programs `superlink`, `superexec`, `server_app`. At a silo: `supernode`, `shim`.

    serverapp, superexec  --Runtime API-->  superlink  <--Fleet API, TLS, node keys--  supernode
    control (supervisor)  --Control API-->  superlink         supernode  <--Runtime API--  shim
                                                                shim  --unix socket-->  trainer

What may die, and how its task is answered all the same (tests/engines/flower/test_world.py):

    killed      is noticed by                                     Flower alone      answered, s
    shim        supernode: no heartbeat, `pace`; asked again      60 s              7-8
    supernode   superlink: the next one takes the dead one's      60 s, 17 s of     5-12
                leave; `post` sees a later activation             them refused
    superexec   its ServerApp, which stops; the run is            run lost          5-16
                submitted again by the supervisor
    serverapp   superexec, at once; the run is submitted again    57 s              4-11
    superlink   nobody needs to: its database is on disk          the same          4-13

Seconds from kill -9 to the answer of a task of 1 s, restarts after 0.5 s, two cores that did other
work as well. Of 42 kills at random moments in five minutes all tasks were answered, the slowest
after 24 s. A warm round trip took 0.7 to 1.3 s there.
"""
