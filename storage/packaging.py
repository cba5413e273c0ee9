"""A cycle's model as MLflow keeps it: code plus files, saved without loading them.

Part of `storage.registry`, which alone uses it.
"""

import json
from importlib.metadata import version
from pathlib import Path

from storage.runs import CycleRecord

# What a served model imports besides Holdfast; versions are those of this machine. Holdfast is not named, as
# the package of that name on the public index is another project, and would be installed in its place.
_REQUIREMENTS = ("mlflow", "torch", "transformers", "peft", "safetensors", "tokenizers")
_EXAMPLE = {"question": "What is the capital of France?", "context": "", "task": ""}


def save(folder: Path, served_model: Path, run_id: str, record: CycleRecord) -> None:
    """Code, adapter and continual state; the base stays where it is, named by its fingerprint."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    parts = {"adapter": str(record.adapter_dir.absolute())}
    if record.state_dir is not None:
        parts["state"] = str(record.state_dir.absolute())
    pyfunc.save_model(
        folder,
        python_model=str(served_model),
        artifacts=parts,
        model_config=json.loads(json.dumps(dict(record.model_config), default=str)),
        mlflow_model=Model(artifact_path=folder.name, run_id=run_id),
        pip_requirements=requirements(),
        # No input schema: MLflow's schemas admit a list of questions or a table with optional
        # columns, never both. The example shows the columns.
        signature=ModelSignature(outputs=Schema([ColSpec(DataType.string)])),
        input_example=pandas.DataFrame([_EXAMPLE]),
    )


def requirements() -> list[str]:
    """What a served model needs, in the versions installed here; nothing is guessed by importing."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]
