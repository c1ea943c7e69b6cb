"""Files, arrays and locks, on a disk or in a bucket."""
