"""The backbone with its bottleneck: layout, attention, weights."""
