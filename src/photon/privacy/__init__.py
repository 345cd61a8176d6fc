"""Differential privacy: the noise of a node, and what it has spent."""

from photon.privacy.noise import SECRET_FILE, gaussian, node_secret, release_key

__all__ = ["SECRET_FILE", "gaussian", "node_secret", "release_key"]
