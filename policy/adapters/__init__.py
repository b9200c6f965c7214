"""Other projects' checkpoints, read without trusting them."""
