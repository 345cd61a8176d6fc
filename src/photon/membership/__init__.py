"""Who takes part, and what they signed: keys, invitations, the roster, a run's audit log.

Import what you need from its module; nothing in here needs torch.
"""
