"""A workdir while it trains: how it begins, what it reports, and what it accounts for."""
