"""What a run leaves behind and comes back from."""
