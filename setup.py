"""Installs kn_detectron. INSTALL.md explains how detectron2 comes beside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: the package cannot be imported before what it needs is installed.
init = Path(__file__).with_name("kn_detectron") / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)[1]

setup(
    name="kn_detectron",
    version=version,
    description="Kalman Normalization for detectron2",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["kn_detectron", "kn_detectron.*"]),
    package_data={
        "kn_detectron": [
            "model_zoo/configs/**/*.yaml",
            "model_zoo/weights/*.pth",
            "data/photos/ATTRIBUTION.md",
            "data/photos/*/*.jpg",
            "data/photos/annotations/*.json",
        ]
    },
    python_requires=">=3.10",
    # detectron2 is missing here on purpose: PyPI has no package of that name by its authors.
    install_requires=[
        "torch>=2.3",
        "torchvision>=0.18",
        "numpy>=1.23",
        "pillow>=9.3",
        "matplotlib>=3.5",
        "opencv-python>=4.5",
        "pycocotools>=2.0.4",
        "pyyaml>=5.1",
        "tabulate>=0.8",
        "tqdm>=4.58",
        "fvcore>=0.1.5.post20221221,<0.1.6",
        "iopath>=0.1.7,<0.1.11",
        "portalocker>=2.0",
        "safetensors>=0.4",
        "tensorboard>=2.10",
    ],
    extras_require={"timm": ["timm>=1.0"]},
)
