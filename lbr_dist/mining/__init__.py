"""Hard negatives: passages that the model at hand takes for the answer, and that are not."""
