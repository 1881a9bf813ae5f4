"""Packaging of mhc_jax. Lower bounds are the oldest versions that the code is known to work with."""

import pathlib
import re
import runpy

from setuptools import find_packages, setup

_ROOT = pathlib.Path(__file__).parent
# Where the repository is published. While this is empty the metadata has no links to it, and the long
# description leaves out what the README only shows beside its files.
_REPOSITORY = ""
_PAPER = "https://arxiv.org/abs/2512.24880"


def _long_description() -> str:
    """The README with links that work on a page of its own."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"\]\((?!https?://|#)([^)\s]+)\)"
    if _REPOSITORY:
        text = re.sub(r"!\[([^\]]*)" + relative, rf"![\1]({_REPOSITORY}/raw/main/\2)", text)
        return re.sub(relative, rf"]({_REPOSITORY}/blob/main/\1)", text)
    text = re.sub(r"!\[[^\]]*" + relative + r"\n?", "", text)
    return re.sub(r"\[([^\]]*)" + relative, r"\1", text)


setup(
    name="mhc_jax",
    version=runpy.run_path(str(_ROOT / "kernels_pallas" / "version.py"))["__version__"],
    description="Manifold-Constrained Hyper-Connections (mHC) in JAX and Flax, with kernels for TPU and GPU",
    long_description=_long_description(),
    long_description_content_type="text/markdown",
    project_urls={"Paper": _PAPER}
    | (
        {
            "Source": _REPOSITORY,
            "Issues": f"{_REPOSITORY}/issues",
            "Changelog": f"{_REPOSITORY}/blob/main/CHANGELOG.md",
        }
        if _REPOSITORY
        else {}
    ),
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "flax", "hyper-connections", "residual connections", "pallas", "triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",  # oldest Python that jax 0.10 has wheels for and CI runs
    # An editable install then puts the clone on the path. Else it is a finder that comes last, and in the
    # folder that holds the clone Python takes the clone itself, `mhc_jax/`, for a package without names.
    package_dir={"": "."},
    # The wheel is the library. Configs and experiments are run from a clone; the emulator is for the tests.
    packages=find_packages(
        include=["mhc_jax*", "kernels_pallas*"], exclude=["kernels_pallas.testing*"]
    ),
    package_data={
        "kernels_pallas": ["py.typed", "**/*.cu", "**/*.cuh"],
        "mhc_jax": ["py.typed"],
    },
    install_requires=[
        "jax>=0.10",  # AxisType meshes and platform_dependent as used here; 0.10.2 and 0.11.2 work
        "flax>=0.12",  # nnx.Variable indexing x[...], pure dicts in nnx.merge
        "optax>=0.2.6",  # optax.tree.norm
        "orbax-checkpoint>=0.11",  # CheckpointManager with composite arguments
        "grain>=0.2.12",  # MapDataset and its orbax handler
        "array_record>=0.8",  # tokenized data sets
        "ml_collections>=1.0",  # typed ConfigDict, config_flags
        "absl-py>=2",  # flags of mhc_jax.main; 2 is what ml_collections 1 is tested with
        "numpy>=2",  # oldest that jax 0.10 takes
        "etils[epath]>=1.9",  # paths in buckets; orbax has it too
        "tensorstore>=0.1.60",  # conditional writes of the workdir's lock; orbax has it too
        "tensorboardX>=2.6",  # events without TensorFlow
        "filelock>=3.12",  # jax locks its cache of compiled programs with it
        "tqdm>=4.60",  # progress bars
        "matplotlib>=3.9",  # figures of experiments; oldest with NumPy 2
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        # triton is pinned to the series that jax-triton 0.3 is built against.
        "gpu": ["jax[cuda13]>=0.10", "jax-triton>=0.3,<0.4", "triton>=3.6,<3.7"],
        "gcs": ["gcsfs>=2025.3"],  # workdirs in buckets, gs://
        "tokenizers": ["tokenizers>=0.20"],  # only for data.tokenizer=<file>.json
        # Tasks of lm-evaluation-harness (experiments.evaluate --tasks). 0.4.13 has the tasks and their index
        # as they are used here, and a next series may rename them; math: what checks the answers of MATH.
        # datasets before 4 ran code of data sets, which the tasks' data no longer need.
        "evaluate": ["lm-eval[math]>=0.4.13,<0.5", "datasets>=4,<6", "tokenizers>=0.20"],
        "released": ["safetensors>=0.5"],  # experiments.released_gains
        "architectures": ["scikit-learn>=1.5"],  # its digits, for experiments.architectures vit
        # pytest 8 knows the options of pyproject.toml; no torch, to keep the environment small.
        "test": [
            # pytest-xdist 3.8 loses its groups under pytest 9.2, and its order can be left alone since 3.7.
            "pytest>=8,<9.2",
            "pytest-xdist>=3.7",
            "ruff>=0.9",
            "mypy>=1.18",
            "tokenizers>=0.20",
            "safetensors>=0.5",
            "flatbuffers>=2",  # jax.export writes programs with it
            "scikit-learn>=1.5",  # its digits; 1.5 knows NumPy 2
            "gcsfs>=2025.3",
            "gcp-storage-emulator>=2026.7",  # a bucket on this machine
            "setuptools>=70.1",  # builds the wheel without the network
            "nbclient>=0.10",  # runs the notebook; 0.10 has ipykernel 7's shutdown
            "nbformat>=5.10",
            "ipykernel>=6.29",
        ],
        # GPU kernels on the CPU (interpreter) and compiled without a GPU, and DeepSeek-V3 as others wrote
        # it (tests/parity reads its parameters by name, hence the pin): slow to install.
        "parity": [
            "torch==2.13.0",
            "transformers==5.23.0",
            "triton>=3.6,<3.7",
            "jax-triton>=0.3,<0.4",
            "nvidia-cuda-nvrtc>=13",  # to compile the CUDA kernels without a GPU
        ],
        # To look at runs; any recent version does.
        "notebook": ["jupyterlab>=4", "pandas>=2"],
    },
)
