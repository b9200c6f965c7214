"""Episodes in a simulator: run in this process or in several, filmed, and written to files."""
