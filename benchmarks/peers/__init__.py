"""Other training loops on the same work, each in a process of its own, taking turns."""
