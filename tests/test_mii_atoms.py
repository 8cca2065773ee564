"""The buffer of attention atoms, past whose end DeepSpeed would write, under MII's own scheduler."""

from __future__ import annotations

from support import mii
from support.mii import counted, engine_on_cpu, run, settings_of

from harness.workload.records import Request

no_gpu, nothing_unsupported = mii.no_gpu, mii.nothing_unsupported


def test_long_prompts_beside_decodes_have_room_for_their_atoms(no_gpu: None) -> None:
    engine = engine_on_cpu(settings_of(token_budget=200, max_sequences=6), blocks=600)
    jobs = [
        Request(uid, "", 40 - uid, prompt_ids=(1,) * length) for uid, length in enumerate([4, 4, 4, 4, 97, 99, 80, 130])
    ]
    assert {uid: one.token_ids for uid, one in run(engine, jobs).items()} == {job.index: counted(job) for job in jobs}
    passes = engine.pipeline.inference_engine.passes
    assert max(len(lengths) for lengths in passes) == 6  # the limit is still that of the config
    assert max(sum(-(-length // 64) for length in lengths) for lengths in passes) > 6  # which was the buffer's length
