"""Loading: numbers, refusals by name, peak memory. Checkpoints are made by hand with the safetensors library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from baleen.model.weights import Target, WeightError, load_weights

E4M3 = torch.float8_e4m3fn
Shards = dict[str, dict[str, Tensor]]


class Taker(nn.Module):
    """A model that only takes tensors."""

    def __init__(self, *targets: Target, ignored: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.targets, self.ignored = targets, ignored

    def checkpoint_tensors(self) -> Iterator[Target]:
        yield from self.targets


def write(folder: Path, shards: Shards, weight_map: dict[str, str] | None = None) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = weight_map or {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def block_fp8(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(-(-rows // 128), -(-cols // 128), generator=generator) + 0.1
    return torch.randn(rows, cols, generator=generator).to(E4M3), scale


def dequantised_by_loops(weight: Tensor, scale: Tensor) -> Tensor:
    values, scales = weight.float().tolist(), scale.tolist()
    return torch.tensor([[v * scales[i // 128][j // 128] for j, v in enumerate(row)] for i, row in enumerate(values)])


def test_dequantises_partial_blocks_into_a_strided_view(tmp_path: Path) -> None:
    """576 rows are 4.5 blocks; the destination is one expert's half of a stacked tensor, whose rest is not touched."""
    weight, scale = block_fp8(576, 200)
    folder = write(tmp_path, {"a.safetensors": {"x.weight": weight, "x.weight_scale_inv": scale}})
    stacked = torch.full((2, 700, 256), -7.0)
    report = load_weights(
        Taker(Target("x.weight", (576, 200), stacked[1, :576, :200], "linear")), folder, progress=False
    )
    torch.testing.assert_close(stacked[1, :576, :200], dequantised_by_loops(weight, scale), rtol=1e-6, atol=0)
    stacked[1, :576, :200] = -7.0
    assert (stacked == -7.0).all()
    assert (report.num_tensors, report.bytes_read) == (1, 576 * 200 + 5 * 2 * 4)


@pytest.mark.parametrize("block_elements", [1, 100 * 40, 1 << 20])
def test_blocks_do_not_change_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_elements: int) -> None:
    monkeypatch.setattr("baleen.model.shards.BLOCK_ELEMENTS", block_elements)
    weight, scale = block_fp8(300, 40)
    plain, vector = torch.randn(37, 11), torch.randn(300).bfloat16()
    stored = {"x.weight": weight, "x.weight_scale_inv": scale, "y.weight": plain, "z.weight": vector}
    folder = write(tmp_path, {"a.safetensors": stored})
    x, y, z = torch.empty(300, 40, dtype=torch.bfloat16), torch.empty(37, 11), torch.empty(300)
    model = Taker(
        Target("x.weight", (300, 40), x, "linear"), Target("y.weight", (37, 11), y), Target("z.weight", (300,), z)
    )
    load_weights(model, folder, progress=False)
    assert torch.equal(x, dequantised_by_loops(weight, scale).bfloat16())
    assert torch.equal(y, plain)
    assert torch.equal(z, vector.float())


def test_each_stored_dtype_into_each_float_destination(tmp_path: Path) -> None:
    value = torch.tensor([1.0, 1.00390625, -3.0])  # the second needs 9 bits: bfloat16 has 8
    folder = write(tmp_path, {"a.safetensors": {"f.weight": value, "b.weight": value.bfloat16()}})
    for dtype in (torch.float32, torch.bfloat16):
        f, b = torch.empty(3, dtype=dtype), torch.empty(3, dtype=dtype)
        load_weights(Taker(Target("f.weight", (3,), f), Target("b.weight", (3,), b)), folder, progress=False)
        assert torch.equal(f, value.to(dtype))
        assert torch.equal(b, value.bfloat16().to(dtype))


def test_fp8_destination_takes_the_bytes_and_the_scale_is_its_own_target(tmp_path: Path) -> None:
    weight, scale = block_fp8(130, 129)
    folder = write(tmp_path, {"a.safetensors": {"x.weight": weight, "x.weight_scale_inv": scale}})
    w, s = torch.empty(130, 129, dtype=E4M3), torch.empty(2, 2)
    load_weights(
        Taker(Target("x.weight", (130, 129), w), Target("x.weight_scale_inv", (2, 2), s)), folder, progress=False
    )
    assert torch.equal(w.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(s, scale)


def test_scale_in_another_shard(tmp_path: Path) -> None:
    weight, scale = block_fp8(129, 130)
    folder = write(
        tmp_path,
        {"b.safetensors": {"x.weight": weight}, "a.safetensors": {"x.weight_scale_inv": scale, "y": scale.clone()}},
    )
    x, y = torch.empty(129, 130), torch.empty(2, 2)
    load_weights(Taker(Target("x.weight", (129, 130), x, "linear"), Target("y", (2, 2), y)), folder, progress=False)
    torch.testing.assert_close(x, dequantised_by_loops(weight, scale), rtol=1e-6, atol=0)
    assert torch.equal(y, scale)


def test_single_file_with_unaligned_payload(tmp_path: Path) -> None:
    """The format does not promise alignment: here a float32 tensor begins one byte after a word."""
    value = torch.randn(5, 3)
    header = {
        "__metadata__": {"format": "pt"},
        "pad": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [5, 3], "data_offsets": [1, 61]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    payload = b"\0" + value.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    x = torch.empty(5, 3)
    load_weights(Taker(Target("x", (5, 3), x), ignored=("pad",)), tmp_path, progress=False)
    assert torch.equal(x, value)


def test_empty_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.safetensors": {"x": torch.empty(0, 4), "y": torch.ones(2)}})
    y = torch.empty(2)
    load_weights(Taker(Target("x", (0, 4), torch.empty(0, 4)), Target("y", (2,), y)), folder, progress=False)
    assert torch.equal(y, torch.ones(2))


# The MTP layer


def mtp_model(y: Tensor, z: Tensor) -> Taker:
    return Taker(
        Target("x", (2,), torch.empty(2)),
        Target("model.layers.6.enorm.weight", (2,), y, optional=True),
        Target("model.layers.6.hnorm.weight", (2,), z, optional=True),
        ignored=("model.layers.*.embed_tokens.weight",),
    )


def test_optional_targets_are_all_there_or_none(tmp_path: Path) -> None:
    y, z = torch.full((2,), -7.0), torch.full((2,), -7.0)
    stored = {"x": torch.ones(2), "model.layers.6.embed_tokens.weight": torch.ones(3)}
    assert not load_weights(mtp_model(y, z), write(tmp_path, {"a.safetensors": stored}), progress=False).optional_loaded
    assert y.tolist() == z.tolist() == [-7.0, -7.0]
    stored["model.layers.6.enorm.weight"] = torch.ones(2)
    with pytest.raises(WeightError, match=r"lacks model\.layers\.6\.hnorm\.weight"):
        load_weights(mtp_model(y, z), write(tmp_path, {"a.safetensors": stored}), progress=False)
    stored["model.layers.6.hnorm.weight"] = torch.full((2,), 2.0)
    report = load_weights(mtp_model(y, z), write(tmp_path, {"a.safetensors": stored}), progress=False)
    assert report.optional_loaded
    assert (y.tolist(), z.tolist(), report.num_tensors) == ([1.0, 1.0], [2.0, 2.0], 3)


# Refusals. The good checkpoint is x (FP8 linear) in a, y (plain) in b; each case spoils it.


def good() -> Shards:
    weight, scale = block_fp8(129, 130)
    return {
        "a.safetensors": {"x.weight": weight, "x.weight_scale_inv": scale},
        "b.safetensors": {"y.weight": torch.ones(4, 2)},
    }


def drop_x(shards: Shards) -> None:
    del shards["a.safetensors"]["x.weight"], shards["a.safetensors"]["x.weight_scale_inv"]
    shards["a.safetensors"]["y.weight"] = shards.pop("b.safetensors")["y.weight"]


def drop_scale(shards: Shards) -> None:
    del shards["a.safetensors"]["x.weight_scale_inv"]


def add_extra(shards: Shards) -> None:
    shards["b.safetensors"]["model.layers.9.q_proj.weight"] = torch.ones(1)


def add_orphan_scale(shards: Shards) -> None:
    shards["b.safetensors"]["y.weight_scale_inv"] = torch.ones(1, 1)


def put(file: str, name: str, value: Tensor) -> Callable[[Shards], None]:
    def spoil(shards: Shards) -> None:
        shards[file][name] = value

    return spoil


REFUSALS: dict[str, tuple[Callable[[Shards], None], str]] = {
    "missing": (drop_x, r"lacks x\.weight"),
    "unknown": (add_extra, r"model\.layers\.9\.q_proj\.weight \(F32 \[1\], in b\.safetensors\): not taken"),
    "orphan scale": (add_orphan_scale, r"y\.weight_scale_inv .*b\.safetensors\): not taken"),
    "shape": (
        put("b.safetensors", "y.weight", torch.ones(2, 4)),
        r"y\.weight \(F32 \[2, 4\], in b\.safetensors\) must have shape \[4, 2\]",
    ),
    "rank": (put("b.safetensors", "y.weight", torch.ones(4, 2, 1)), r"y\.weight .*must have shape \[4, 2\]"),
    "int8": (
        put("b.safetensors", "y.weight", torch.ones(4, 2, dtype=torch.int8)),
        r"y\.weight \(I8 .*b\.safetensors\) must be F32 or BF16",
    ),
    "int8 linear": (
        put("a.safetensors", "x.weight", torch.ones(129, 130, dtype=torch.int8)),
        r"x\.weight \(I8 .*must be F32 or BF16 or F8_E4M3",
    ),
    "fp8 where plain": (
        put("b.safetensors", "y.weight", torch.ones(4, 2).to(E4M3)),
        r"y\.weight \(F8_E4M3 .*quantization_config",
    ),
    "no scale": (drop_scale, r"x\.weight \(F8_E4M3 .*a\.safetensors\) is FP8 but .*x\.weight_scale_inv"),
    "scale of a float weight": (
        put("a.safetensors", "x.weight", torch.ones(129, 130)),
        r"x\.weight_scale_inv .*but x\.weight \(F32 .* is not FP8",
    ),
    "scale shape": (
        put("a.safetensors", "x.weight_scale_inv", torch.ones(1, 2)),
        r"x\.weight_scale_inv .*must be \[2, 2\]",
    ),
    "scale dtype": (
        put("a.safetensors", "x.weight_scale_inv", torch.ones(2, 2).bfloat16()),
        r"x\.weight_scale_inv .*must be F32",
    ),
}


def load_good(folder: Path) -> tuple[Tensor, Tensor]:
    x, y = torch.full((129, 130), -7.0), torch.full((4, 2), -7.0)
    model = Taker(Target("x.weight", (129, 130), x, "linear"), Target("y.weight", (4, 2), y))
    try:
        load_weights(model, folder, progress=False)
    except WeightError:
        assert (x == -7.0).all(), "something was read before the refusal"
        assert (y == -7.0).all(), "something was read before the refusal"
        raise
    return x, y


def test_good_checkpoint_loads(tmp_path: Path) -> None:
    x, y = load_good(write(tmp_path, good()))
    assert (x != -7.0).all()
    assert (y == 1.0).all()


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_by_name_before_reading(tmp_path: Path, case: str) -> None:
    spoil, message = REFUSALS[case]
    shards = good()
    spoil(shards)
    with pytest.raises(WeightError, match=message):
        load_good(write(tmp_path, shards))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_refuses_bad_scales(tmp_path: Path, value: float) -> None:
    shards = good()
    shards["a.safetensors"]["x.weight_scale_inv"][1, 0] = value
    with pytest.raises(WeightError, match=r"x\.weight_scale_inv .*a\.safetensors.*NaN"):
        load_good(write(tmp_path, shards))


def test_zero_scale_is_a_zero_block(tmp_path: Path) -> None:
    shards = good()
    shards["a.safetensors"]["x.weight_scale_inv"][0, 0] = 0.0
    x, _ = load_good(write(tmp_path, shards))
    assert (x[:128, :128] == 0).all()


def test_refuses_truncated_file_naming_the_tensor(tmp_path: Path) -> None:
    folder = write(tmp_path, good())
    raw = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(raw[:-1])
    with pytest.raises(WeightError, match=r"y\.weight .*truncated.*b\.safetensors: download"):
        load_good(folder)
    for length in (0, 5, 8, 30):
        (folder / "b.safetensors").write_bytes(raw[:length])
        with pytest.raises(WeightError, match=r"b\.safetensors: the safetensors header is"):
            load_good(folder)


def test_refuses_damaged_header(tmp_path: Path) -> None:
    for header in (
        b"[]",
        b"{]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
    ):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
        with pytest.raises(WeightError, match=r"model\.safetensors"):
            load_good(tmp_path)


def test_refuses_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path, good())
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightError, match=r"b\.safetensors, which .* names for y\.weight, does not exist"):
        load_good(folder)


def test_refuses_index_that_disagrees(tmp_path: Path) -> None:
    both = {"x.weight": "a.safetensors", "x.weight_scale_inv": "a.safetensors", "y.weight": "b.safetensors"}
    with pytest.raises(WeightError, match=r"y\.weight is in b\.safetensors, but .* places it in a\.safetensors"):
        load_good(write(tmp_path, good(), {**both, "y.weight": "a.safetensors", "z": "b.safetensors"}))
    with pytest.raises(WeightError, match=r"z is not in b\.safetensors, where .* places it"):
        load_good(write(tmp_path, good(), {**both, "z": "b.safetensors"}))
    shards = good()
    shards["b.safetensors"]["w"] = torch.ones(1)
    with pytest.raises(WeightError, match=r"w is in b\.safetensors, but .* does not list it"):
        load_good(write(tmp_path, shards, both))
    with pytest.raises(WeightError, match="own folder"):
        load_good(write(tmp_path, good(), {**both, "y.weight": "../b.safetensors"}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_refuses_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match=r"index\.json"):
        load_good(tmp_path)


def test_refuses_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="holds neither"):
        load_good(tmp_path)


def test_progress_bar_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, {"a.safetensors": {"y": torch.ones(1024)}})
    load_weights(Taker(Target("y", (1024,), torch.empty(1024))), folder, progress=False)
    assert capsys.readouterr().err == ""
    load_weights(Taker(Target("y", (1024,), torch.empty(1024))), folder)
    assert "100%" in capsys.readouterr().err


# Peak memory, in a process of its own

MEASURE = """
import sys
from pathlib import Path
import torch
from baleen.model.test_weights import LAYERS, Taker
from baleen.model.weights import Target, load_weights

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.ones(4).bfloat16().float()
before = kib("VmRSS")
params = [torch.empty(rows, cols, dtype=getattr(torch, sys.argv[2])) for rows, cols in LAYERS]
model = Taker(*(Target(f"{i}.weight", tuple(p.shape), p, "linear") for i, p in enumerate(params)))
load_weights(model, Path(sys.argv[1]), progress=False)
print(kib("VmHWM") - before, sum(p.nbytes for p in params) / 1024, sum(float(p[-1, -1]) for p in params))
"""
LAYERS = [(1600, 1024)] * 33 + [(576, 2000)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("stored", "dest", "num_shards"),
    [("fp8", "float32", 12), ("bf16", "float32", 12), ("bf16", "bfloat16", 12), ("bf16", "float32", 1)],
)
def test_peak_memory_is_within_15_percent_of_the_model(tmp_path: Path, stored: str, dest: str, num_shards: int) -> None:
    """220 MB as float32. One big file must cost no more than many small ones: mapped pages are given back."""
    shards: Shards = {f"{n}.safetensors": {} for n in range(num_shards)}
    for i, (rows, cols) in enumerate(LAYERS):
        shard = shards[f"{i % num_shards}.safetensors"]
        if stored == "fp8":
            shard[f"{i}.weight"] = torch.full((rows, cols), 0.5).to(E4M3)
            shard[f"{i}.weight_scale_inv"] = torch.full((-(-rows // 128), -(-cols // 128)), 2.0)
        else:
            shard[f"{i}.weight"] = torch.ones(rows, cols, dtype=torch.bfloat16)
    write(tmp_path, shards)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dest], capture_output=True, text=True, check=True, timeout=120
    )
    peak, model, total = map(float, out.stdout.split())
    assert total == len(LAYERS)
    assert model < peak <= 1.15 * model
