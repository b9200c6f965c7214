"""Training a policy: settings, preparation, the loop and its phases."""
