"""Console commands: wiring between configuration, environments and policies."""
