"""Episodes in a simulator: in this process or in several, recorded and written down."""
