"""Questions and answers over a Flower federation, by Flower's public API: docs/flower.md.

    app     what `flwr run` submits; no code is in it
    server  the ServerApp, on the aggregator's machine: mailbox <-> Flower's SuperLink
    client  the ClientApp, at a site: Flower's SuperNode <-> the trainer's socket

The desk hands nothing out meanwhile (serve.control = "flower"); everything but Asks and Replies
goes to the door as ever. Nothing else of Photon imports Flower.
"""
