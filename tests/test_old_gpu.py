"""A GPU without sparse tensor cores: other kernels or dense, and the reason in the report."""

import pytest
import torch

from sparsefx import NM
from sparsefx.codegen.cuda_library import LIBRARY_KERNELS
from sparsefx.codegen.triton.kernels import kernels
from sparsefx.passes.lower import Lower
from sparsefx.target import Target
from tests.compilers import accept, refuse
from tests.pass_models import FUSED, Around, after, assert_same_numbers, sparse, x_of


@pytest.mark.parametrize("others", [True, False])
def test_kernels_for_sparse_tensor_cores_decline(
    others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Around(lambda s, x: s.l(x), l=sparse(NM(2, 4), 64, 64)).half()
    gm, ctx, _ = after(model, FUSED, x_of(8, 64).half())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    target = Target("cuda", "cuda", (*kernels(), *LIBRARY_KERNELS))
    lower = Lower(target, accept if others else refuse)
    lower(gm, ctx)
    monkeypatch.undo()
    (row,) = ctx.rows.values()
    if others:
        assert row.kernel and "mma_sp" not in row.kernel and "lt" not in row.kernel, row
        return
    assert not row.kernel
    assert "triton_mma_sp_linear: Tesla T4 has no sparse tensor cores" in row.reason
    for kernel in LIBRARY_KERNELS:
        assert f"{kernel.name}: a GPU of compute capability 7.5 has no sparse" in row.reason
    assert_same_numbers(gm, model, x_of(8, 64).half())
