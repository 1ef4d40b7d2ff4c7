"""The engine's loop where it is disturbed."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from baleen import engine
from baleen.llm import LLM
from baleen.messages import SamplingParams
from baleen.model.random_checkpoint import build_random_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupted_generate_leaves_an_engine_that_works(tmp_path: Path, overlap: bool, at: int) -> None:
    """Ctrl-C comes while `step` waits for the runner; the steps in flight belong to nobody then, and do no harm."""
    build_random_checkpoint(tmp_path / "model", size="tiny")
    with LLM(str(tmp_path / "model"), disable_overlap_schedule=not overlap) as llm:
        expected = llm.generate([5, 6, 7], GREEDY)[0].token_ids
        submit, futures = llm.engine._thread.submit, []

        def interrupted(*args: Any) -> Future[Any]:
            future = submit(*args)
            futures.append(future)
            if len(futures) == at + 1:
                result = future.result

                def once() -> Any:
                    future.result = result  # type: ignore[method-assign]
                    raise KeyboardInterrupt

                future.result = once  # type: ignore[method-assign, assignment]
            return future

        llm.engine._thread.submit = interrupted  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6, 7], [8] * 100], GREEDY)
        assert llm.generate([5, 6, 7], GREEDY)[0].token_ids == expected
        llm.engine.scheduler.check_invariants()
        assert llm.engine.flush_cache().ok


@pytest.mark.parametrize("skip", [False, True])
def test_kernels_are_compiled_before_the_model_is_loaded_and_marked_after_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    build_random_checkpoint(tmp_path / "model", size="tiny")
    calls: list[Any] = []
    mark, load = tmp_path / "mark", engine.ModelRunner
    monkeypatch.setattr(engine, "compile_ahead", lambda config, **_: calls.append("ahead") or mark)
    monkeypatch.setattr(engine, "ModelRunner", lambda *args, **more: calls.append("load") or load(*args, **more))
    monkeypatch.setattr(engine, "warm_up", lambda *args, **_: calls.append("warm up"))
    monkeypatch.setattr(engine, "remember", calls.append)
    with LLM(str(tmp_path / "model"), skip_server_warmup=skip):
        assert calls == (["load", None] if skip else ["ahead", "load", "warm up", mark])
