"""compile, sparsify, sensitivity, export_onnx, explain, the torch.compile backend.

What joins all parts: the one place, with the command line, that knows passes and kernels at once.
"""

from sparsefx.api.compiled import compile as compile
from sparsefx.api.onnx_file import export_onnx as export_onnx
from sparsefx.api.reporting import explain as explain
from sparsefx.api.reporting import pruning_report as pruning_report
from sparsefx.api.sensitivity import sensitivity as sensitivity
from sparsefx.api.sparse_model import sparsify as sparsify
from sparsefx.api.target_table import targets as targets
from sparsefx.api.torch_backend import backend as backend
