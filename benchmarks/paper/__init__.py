"""The paper's experiments on real domains, each from one command (see `__main__`)."""
