"""What the engine must show on one H200, measured: decode, prefill, long contexts, the server's loop, answers, start.

    python3 benchmarks/gpu_targets.py --out FOLDER [--part decode prefill long server answers start]

Each part is a process of its own with a time limit, three minutes or so. FOLDER gets results.json, log.txt and
profiles.txt; a short table ends each part. It needs torch, numpy, safetensors, tokenizers, tqdm, jinja2 and msgspec;
for the fast kernels sgl-deep-gemm (with apache-tvm-ffi) and sgl-flash-mla. `--device cpu` runs tiny shapes, to test
this script.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu import answers, serving, speed
from gpu.stages import end_on_sigterm, run_here, spawn

PARTS = {
    "decode": speed.decode,
    "prefill": speed.prefill,
    "long": speed.long,
    "server": serving.server,
    "answers": answers.answers,
    "start": serving.start,
}
SECONDS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--here", choices=tuple(PARTS), help="this part alone, in this process")
    parser.add_argument(
        "--write-answers", action="store_true", help="ask the bundled model on the CPU, keep its answers"
    )
    given = parser.parse_args()
    if given.write_answers:
        answers.write_expected()
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        return run_here(given.here, PARTS[given.here], given.device, given.out)
    end_on_sigterm()
    codes: dict[str, int] = {}
    for part in given.part:
        work = given.out / "parts" / part  # as it goes: whatever happens to this process, it is there
        work.mkdir(parents=True, exist_ok=True)
        codes[part] = spawn(__file__, "--here", part, given.device, work, SECONDS)
        collect(part, codes[part], work, given.out)
    print("exit codes:", codes)
    return int(any(codes.values()))


def collect(part: str, code: int, work: Path, out: Path) -> None:
    """What a part wrote goes to the three files of `out`, beside that of parts run before; its log's end to stdout."""
    log = (work / f"{part}.log").read_text()
    for name, text in (("log.txt", f"==== {part}\n{log}\n"), ("profiles.txt", speed.gather_profiles(work))):
        with (out / name).open("a") as file:
            file.write(text)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    found = work / f"{part}.json"
    results[part] = {"exit code": code, "lines": json.loads(found.read_text()) if found.exists() else []}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"==== {part}\n{log[-2000:]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
