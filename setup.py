from pathlib import Path

from setuptools import setup

# The repository's folders are packages inside `perceptriton`, whose own few files are in mlp/_front.
setup(
    name="perceptriton",
    version="0.1.0",
    description="Sigmoid MLPs in fused Triton kernels for PyTorch",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
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
        "bench": ["jax"],
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
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
