"""`lbr prepare`: two passes over the sources, and between them the choice of sides, which share nothing."""
