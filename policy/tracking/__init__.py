"""Where metrics go: nowhere, or to Weights & Biases."""
