"""What the process that all others are forked from has done already: imports, and MLflow's first steps.

It starts no thread, and keeps nothing open that two processes might share.
"""

import tempfile
from pathlib import Path

import strategies.base
import strategies.blend
import strategies.evaluation
import strategies.loop  # noqa: F401
from storage.registry import Registry

with tempfile.TemporaryDirectory() as _folder:  # MLflow imports half of itself at its first connection
    _registry = Registry(
        f"sqlite:///{_folder}/mlflow.db", "warm", Path(_folder), Path("unused"), store_id="warm"
    )
    _registry.check()
    _registry.alias("champion")
