"""What each generated kernel must look like once compiled for a GPU, whatever its settings."""

from sparsefx.codegen.triton.matrix import NVIDIA, Job

MATRIX = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}

SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program


def faults(job: Job, found: dict[str, object]) -> list[str]:
    """What is wrong with one compiled kernel: [] if nothing is."""
    counts = found["instructions"]
    assert isinstance(counts, dict)
    wrong = [f"{what} {found[what]}" for what in ("spills", "stack") if found[what]]
    if "local" in counts:
        wrong.append("it uses local memory")
    if not found["in_lanes"]:
        wrong.append("the operands of its inline PTX lie in another layout")
    shared = found["shared"]
    assert isinstance(shared, int)
    # other tunings may be too large for a small GPU: the launch is refused, the guard takes another
    if job.place == 0 and shared > SHARED[job.arch] * 1024:
        wrong.append(f"{shared} bytes of shared memory do not fit")
    if not set(_wanted(job)) & set(counts):
        wrong.append(f"none of {_wanted(job)} in {counts}")
    if not counts.get("store"):
        wrong.append("it stores nothing")
    return wrong


def _wanted(job: Job) -> tuple[str, ...]:
    """Instructions of which one must be there."""
    form = job.handle.split()[0]
    if job.kernel != "kernel":
        return ("store",)
    if form == "mma_sp":
        return ("mma_sp",)
    if form == "places":
        return ("load128" if job.arch in NVIDIA else "load",)
    if "float32" in job.handle:  # NVIDIA's tensor cores would cut it to ten bits
        return ("store",)
    small = form == "block" and not job.handle.startswith(("block 64x", "block 128x"))
    return (MATRIX[job.arch], "mma") if small else (MATRIX[job.arch],)
