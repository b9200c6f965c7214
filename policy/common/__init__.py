"""What every room uses: settings and their checks, output folders, locks, seeds, progress."""
