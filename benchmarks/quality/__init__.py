"""How well the methods keep old skills: streams at the level of the worker's stages, without a daemon."""
