"""How does a model learn without forgetting, and how good is it? Knows nothing of stores or schedules."""
