"""Where objects lie between those who write and those who read, and how they get there.

No torch: the services of a deployment import this, and hold no model.
"""
