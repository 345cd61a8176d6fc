"""What a deployment is made of besides the federation itself: processes that are kept up,
certificates, the front door, the embedded store, the desk, and checks before a start.

Nothing here imports torch or Flower, and this file imports nothing.
"""
