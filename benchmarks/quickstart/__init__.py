"""The quickstart: a real domain, all arms of the paper's comparison, in about ten minutes on two cores."""
