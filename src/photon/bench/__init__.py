"""`photon bench`: methods beside each other at equal budgets, claims with what became of them."""
