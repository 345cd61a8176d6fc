"""Dated rules, and what they say of cards: a prediction, not legal advice. No torch, no network."""
