"""Losses: generative (paper section 3.2) and contrastive (paper section 3.3)."""
