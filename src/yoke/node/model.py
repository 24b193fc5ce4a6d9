"""The model that a cluster serves: its file and its spec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from yoke.core.errors import ModelError
from yoke.core.spec import ModelSpec
from yoke.models.families import model_spec
from yoke.weights.gguf import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An open model file. ``created_at`` is its modification time, in seconds since the epoch."""

    path: Path
    spec: ModelSpec
    file: GgufFile
    created_at: int

    @property
    def digest(self) -> bytes:
        """What tells this model's weights from another's."""
        return bytes.fromhex(self.file.digest)

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> Self:
        """Open a GGUF file; its name without the ending becomes the model's, unless another is given.

        Raises
        ------
        ModelError
            if there is no such file, it is broken, or its architecture is not known.
        """
        if path.is_dir():
            raise ModelError(f"{path} is a directory; expected a GGUF file. Convert a Hugging Face directory with: yoke convert {path} model.gguf")
        if not path.exists():
            raise ModelError(f"{path} does not exist; expected a GGUF file")
        file = GgufFile.open(path)
        try:
            spec = model_spec(name or path.stem, file.metadata, file.tensors)
        except BaseException:
            file.close()
            raise
        return cls(path=path.resolve(), spec=spec, file=file, created_at=int(path.stat().st_mtime))
