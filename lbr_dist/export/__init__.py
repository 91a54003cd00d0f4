"""What leaves a run: a folder that plain sentence-transformers and transformers load."""
