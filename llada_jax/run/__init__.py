"""A workdir while it trains: its start, its clock, its metrics, its progress and its rollbacks."""
