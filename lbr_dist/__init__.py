"""Learn Before Represent: distributed training of domain-specific embedding models."""

__version__ = "0.1.0"
