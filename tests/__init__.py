"""Real databases, models, processes and signals."""
