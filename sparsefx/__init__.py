"""SparseFX: a compiler for neural-network sparsity."""

from sparsefx import ops as ops
from sparsefx.api import backend as backend
from sparsefx.api import compile as compile
from sparsefx.api import explain as explain
from sparsefx.checkpoint import load as load
from sparsefx.checkpoint import save as save
from sparsefx.errors import SparseFXError as SparseFXError
from sparsefx.prune.sparsify import sparsify as sparsify
from sparsefx.report import Report as Report
from sparsefx.report import Row as Row
from sparsefx.spec import NM as NM
from sparsefx.spec import Block as Block
from sparsefx.spec import Magnitude as Magnitude
from sparsefx.spec import Recipe as Recipe
from sparsefx.spec import Unstructured as Unstructured
from sparsefx.target import Target as Target
