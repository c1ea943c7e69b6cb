"""From raw text to batches: reading, tokenizing, packing, records on a disk, and the loader."""
