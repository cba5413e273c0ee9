"""When, whether, and what happens next? The service, the cycle, the gate, the command line."""
