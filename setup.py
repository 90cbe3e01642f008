# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import setup

URL = "https://github.com/perceptriton/perceptriton"
# An index page shows the README without the repository: its links and pictures get addresses.
README = re.sub(
    r"(!?)(\[[^\[\]]*\])\((?!https?:|#)([^)]+)\)",
    lambda found: f"{found[1]}{found[2]}({URL}/{'raw' if found[1] else 'blob'}/main/{found[3]})",
    Path("README.md").read_text(encoding="utf-8"),
)

# The repository's folders are packages inside `perceptriton`, whose own few files are in mlp/_front.
setup(
    name="perceptriton",
    version="0.1.0",
    description="Sigmoid, tanh and relu MLPs for PyTorch, in fused Triton kernels and compiled CPU loops",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The perceptriton authors",
    url=URL,
    project_urls={
        "Documentation": f"{URL}/tree/main/docs",
        "Changes": f"{URL}/blob/main/CHANGELOG.md",
        "Issues": f"{URL}/issues",
        "Source": URL,
    },
    keywords=["pytorch", "triton", "mlp", "sigmoid", "fused kernels", "ensembles", "training loops", "backpropagation"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    zip_safe=False,  # tables are read as files
    package_dir={"perceptriton": "mlp/_front", "perceptriton.kernels": "kernels", "perceptriton.mlp": "mlp"},
    packages=[
        "perceptriton",
        *(
            ".".join(("perceptriton", *found.parent.parts))
            for folder in ("kernels", "mlp")
            for found in sorted(Path(folder).rglob("__init__.py"))
            if found.parent.name != "_front"
        ),
    ],
    package_data={
        "perceptriton": ["py.typed"],
        "perceptriton.kernels": ["py.typed", "tuned/*.json"],
        "perceptriton.mlp": ["py.typed"],
        "perceptriton.mlp.lessons": ["tables/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy",
        # CUDA builds of torch bring the one triton that they were built for; CPU builds bring none.
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "cli": ["matplotlib", "tqdm"],
        "native": ["numba>=0.61"],
        "sklearn": ["scikit-learn>=1.6"],
        "bench": ["jax", "skorch"],
        "docs": ["sphinx>=8.1", "myst-parser>=4", "furo>=2025.7"],
        "dev": [
            "matplotlib",
            "tqdm",
            "scikit-learn>=1.6",
            "numba>=0.61",
            "kernels~=0.17",
            "safetensors",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "ruff",
            "basedpyright",
            "mypy",
            "jedi",
            "setuptools>=77",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": ["perceptriton = perceptriton.mlp.__main__:main"],
        "torch_dynamo_backends": ["perceptriton = perceptriton.mlp.backend:perceptriton"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
