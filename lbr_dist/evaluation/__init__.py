"""What a model is worth: retrieval, generation, separation, and the report that compares runs."""
