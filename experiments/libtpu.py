"""Sets up libtpu's compiler on a host without a TPU; import it before jax."""

import os

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    # libtpu looks for a TPU of the host, whatever it compiles for, and prints alarms if there is none.
    "TPU_ACCELERATOR_TYPE": os.environ.get("TPU_ACCELERATOR_TYPE", "v5p-8"),
    "TPU_WORKER_HOSTNAMES": os.environ.get("TPU_WORKER_HOSTNAMES", "localhost"),
}
