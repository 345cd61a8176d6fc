"""What a deployment is made of besides the federation itself: processes that are kept up,
certificates, the front door, the embedded store, the desk, and checks before a start.

Nothing here but `loop` imports torch, and this file imports nothing.
"""
