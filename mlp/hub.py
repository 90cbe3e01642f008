# SPDX-License-Identifier: Apache-2.0
"""Writes this package as the kernel hub of the package `kernels` loads it.

What is installed is copied, file by file: kernels/ and mlp/ stay side by side, so that their relative imports hold. The
loader imports a copy under the id in its metadata, from which ops take their namespace: copies of any version, and the
installed package, live in one process.

    build/torch-BACKEND/        what the loader reads, with its metadata
    torch-ext/perceptriton/     the same files, as source for the tool kernel-builder
    build.toml, CARD.md         what kernel-builder and the hub's page read
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from .. import kernels, mlp
from . import hub_layers

__all__ = ["export"]

NAME = "perceptriton"
VERSION = 1  # of the names in __all__ and what they do
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda")
EXTENSIONS = ("py", "json")

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}
{{hub}}
[torch-noarch]
pyext = {json.dumps(EXTENSIONS)}
"""

CARD = f"""\
---
library_name: kernels
license: {LICENSE.lower()}
---

Sigmoid, tanh and relu MLPs in fused Triton kernels for PyTorch: layers, whole networks and whole training loops. Needs
Python 3.10 and torch 2.11, or newer. Without a GPU it runs in plain torch.

```python
from kernels import get_kernel

perceptriton = get_kernel("{{repo_id}}", version={VERSION}, trust_remote_code=True)
model = perceptriton.MLP([784, 128, 10])
```

`kernelize` puts the `forward` of one of its layers into a layer of the same name that has a `weight` and a `bias`.

## Names

{{functions}}

## Layers

{{layers}}
"""


def export(directory: str | os.PathLike[str], repo_id: str | None = None) -> dict[str, str]:
    """Writes everything into a directory that is empty or does not exist, and returns variant -> id of its copies.

    repo_id: OWNER/NAME on the hub, for build.toml and the card. The directory is complete or not there: it is written
    under another name beside its place and then renamed. Raises ValueError for a directory that holds something and a
    repo_id of another form, OSError if it cannot be written.
    """
    if repo_id is not None and not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", repo_id):
        raise ValueError(f"repo_id must be OWNER/NAME, not {repo_id!r}")
    target = Path(os.path.realpath(directory))
    if not target.parent.is_dir():
        raise ValueError(f"{str(target.parent)!r} is not a directory")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(directory)!r} exists and is not a directory")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{str(directory)!r} exists and is not empty")
    package = _package()
    metadata = {f"torch-{backend}": _metadata(package, backend) for backend in BACKENDS}
    # Inside of a folder that is there: it may be the current one, a mount point, or nobody else's to read.
    name, there = f".{NAME}-{secrets.token_hex(4)}", target.exists()
    partial = target / name if there else target.with_name(name)
    try:
        for variant, about in metadata.items():
            _write(partial / "build" / variant, package | {"metadata.json": json.dumps(about, indent=2).encode()})
        _write(partial / "torch-ext" / NAME, package)
        _write(partial, _repository_files(repo_id))
        if there:
            for part in partial.iterdir():
                part.rename(target / part.name)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {variant: str(about["id"]) for variant, about in metadata.items()}


def _package() -> dict[str, bytes]:
    """Path -> content of every file of a copy, its metadata aside."""
    root = Path(__file__).parents[1]
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("kernels", "mlp")
        for extension in EXTENSIONS
        for path in (root / folder).rglob(f"*.{extension}")
        if path.parent.name != "_front"  # of a working tree: a copy has a front of its own
    }
    files["__init__.py"] = _exports({"": ["layers"], "kernels": kernels.__all__, "mlp": mlp.__all__})
    files["layers.py"] = _exports({"mlp.hub_layers": hub_layers.__all__})
    return dict(sorted(files.items()))


def _exports(modules: Mapping[str, list[str]]) -> bytes:
    """The source of a module that imports these names from these modules."""
    imports = "".join(f"from .{module} import {', '.join(names)}\n" for module, names in modules.items())
    return f"{imports}\n__all__ = {json.dumps([*chain.from_iterable(modules.values())])}\n".encode()


def _metadata(package: Mapping[str, bytes], backend: str) -> dict[str, object]:
    """What kernel-builder writes beside a build, without the build's origin, which only kernel-builder knows."""
    digests = {path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in package.items()}
    identity = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    return {
        "id": f"_{NAME}_{backend}_{identity}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def _repository_files(repo_id: str | None) -> dict[str, bytes]:
    """The files that say what the repository is."""
    hub = "" if repo_id is None else f'\n[general.hub]\nrepo-id = "{repo_id}"\n'
    names = (kernels.__all__ + mlp.__all__, hub_layers.__all__)
    functions, layers = ("\n".join(f"- `{name}`" for name in part) for part in names)
    card = CARD.format(repo_id=repo_id or f"OWNER/{NAME}", functions=functions, layers=layers)
    return {"build.toml": BUILD.format(hub=hub).encode(), "CARD.md": card.encode()}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
