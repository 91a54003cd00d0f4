"""Three real domains, derived from installable packages: chemistry, medicine and code (see `__main__`)."""
