"""A site's side of a federation: its policy, its trainer, and what they say to the aggregator.

Imports nothing: the services beside the trainer use its socket, and hold no torch.
"""
