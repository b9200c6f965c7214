"""Console commands: wiring between configuration, environments and policies."""

from scripts.modules import check_own_packages

check_own_packages()
