"""A model that goes out with its history: what a release holds, signed and checked. No torch."""
