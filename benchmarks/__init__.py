"""One script per claim in the README, and the results it printed."""
