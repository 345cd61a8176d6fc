"""The engine for silos elsewhere: tensors through a store, tasks and receipts through a post.

    engine      a round's tasks, as errands, and their answers
    errand      one Ask on its way
    messenger   sends errands, verifies what comes back, asks again, gives up
    depot       states and updates in the store, and updates that are here
    arrivals    updates fetched ahead, in the order of tasks

Answers are handed over in the order of tasks: the merged weights do not depend on who was faster.
"""

from photon.engines.remote.depot import Depot
from photon.engines.remote.engine import Asker, RemoteEngine
from photon.engines.remote.messenger import Post

__all__ = ["Asker", "Depot", "Post", "RemoteEngine"]
