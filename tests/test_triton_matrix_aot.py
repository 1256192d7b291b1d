"""A sample of all kernels that can be generated compiles for real GPUs; `make aot` takes all.

The sample changes from day to day. Its seed is in the tests' names: SPARSEFX_AOT_SEED repeats one.
"""

import dataclasses
import datetime
import json
import os
from collections import Counter

import pytest

from sparsefx.codegen.triton import forms
from sparsefx.codegen.triton.matrix import AMD, NVIDIA, Job, jobs
from tests.aot_client import Worker
from tests.aot_expected import faults

SEED = os.environ.get("SPARSEFX_AOT_SEED") or datetime.datetime.now(datetime.UTC).date().isoformat()
SAMPLE = 20
SAMPLED = sorted(jobs(), key=lambda job: job.rank(SEED))[:SAMPLE]


def name(job: Job) -> str:
    return f"{SEED} {job.arch} {job.rows} rows {job.kernel} of {job.handle}"


@pytest.mark.parametrize("job", SAMPLED, ids=name)
def test_compiles_as_expected(worker: Worker, job: Job) -> None:
    answer = worker.ask(json.dumps(job.request()))
    assert answer.pop("ok"), answer
    assert not faults(job, answer), answer


def test_the_list_is_whole_and_has_nothing_twice() -> None:
    every = list(jobs())
    assert len(set(every)) == len(every) < 1650  # a quarter of an hour on two cores
    seen = Counter(job.handle.split()[0] for job in every)
    assert set(seen) == set(forms.FORMS)
    assert {job.place for job in every if job.handle.startswith("block")} == {0, 1, 2, 3, 4}
    assert {job.arch for job in every} == {*NVIDIA, *AMD}
    assert {job.kernel for job in every} == {"kernel", "reduce", "fragments_of", "ordered"}
    gated = {job.handle.split()[0] for job in every if "-> gate_silu" in job.handle}
    assert gated == set(forms.FORMS)
    assert not any(job.arch in AMD for job in every if job.handle.startswith("mma_sp"))


def test_another_seed_takes_another_sample() -> None:
    every = list(jobs())
    one, two = (sorted(every, key=lambda job: job.rank(s))[:SAMPLE] for s in ("1", "2"))
    assert one != two


def test_faults_are_seen() -> None:
    job = next(job for job in jobs() if job.kernel == "kernel" and job.place == 0)
    counts = {"local": 1}
    found = {"spills": 8, "stack": 0, "shared": 2**20, "in_lanes": False, "instructions": counts}
    assert len(faults(job, found)) == 6
    assert len(faults(dataclasses.replace(job, place=1), found)) == 5  # may be refused at launch
