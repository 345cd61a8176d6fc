"""How good is a model: held-out loss, perplexity, bits per byte."""

from photon.evaluation.perplexity import HeldOutScore, LossSum, evaluate_loss, score

__all__ = ["HeldOutScore", "LossSum", "evaluate_loss", "score"]
