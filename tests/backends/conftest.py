"""Where cuda-python cannot be installed, what is tested over it is left out."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("cuda") else ["test_cuda.py", "test_tensorrt_engine.py"]
