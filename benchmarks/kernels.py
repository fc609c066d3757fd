"""What the CPU kernels reach, beside what this machine allows: ``python benchmarks/kernels.py``.

The limits are measured in the same run: read bandwidth by summing a large array, fp32 peak by one large matrix product
of torch. Shapes are SmolLM2-135M's. Weights are cycled through more memory than the caches hold, as in a real step.
Weights of few bits multiply as integers, so their share of fp32's peak may be above 100 %. The last lines are of the
engine with the real model: whole decode steps and the share of each that is not spent in native calls, and a prompt,
beside what torch's product of 8-bit integers would allow if there were nothing else to do. (a prompt needs the head
for its last token alone; the usual count of operations per token, twice the parameters, has it for each)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.quantized import GROUP, Quantized
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kernels.packed_linear import PackedLinear, QuantizedLinear
from tokenrelay.model.transformer.kv_cache import LayerCache

LINEARS = {"qkv": (576, 960), "out": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
ROWS = (1, 4, 6, 16, 32, 64, 512)
COLD_BYTES = 200e6  # weights touched in one round: well above the last-level cache
CONTEXTS = ((1, 1, 512), (1, 1, 4096), (16, 1, 512), (64, 1, 512), (1, 512, 512), (1, 512, 2048))
WINDOW = 512
MODEL = "smollm2-135m-instruct"
STEP_ROWS = (1, 16, 64)
LAYERS = 30
LAYER = [LINEARS[name] for name in ("qkv", "out", "gate_up", "down")]
PROMPT = 512
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16


def seconds(call: Callable[[], object], at_least: float = 0.15) -> float:
    """Best of three means."""
    call()
    best = float("inf")
    for _ in range(3):
        count, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < at_least / 3 or count == 0:
            call()
            count += 1
        best = min(best, elapsed / count if count else elapsed)
    return best


def read_bandwidth() -> float:
    """Bytes per second of reading a large array."""
    array = torch.ones(64 * 1024 * 1024)
    return array.numel() * 4 / seconds(array.sum)


def peak_operations() -> float:
    """fp32 operations per second of torch's (MKL's) product of two matrices."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / seconds(lambda: a @ a)


def report(
    operation: str, size: str, elapsed: float, bytes_read: float, operations: float, limits: tuple[float, float]
) -> None:
    """One line; the share is of whichever limit is the nearer one."""
    share = max(bytes_read / limits[0], operations / limits[1]) / elapsed
    print(
        f"{operation:13} {size:26} {elapsed * 1e6:10.1f} us {bytes_read / elapsed / 1e9:8.1f} GB/s"
        f" {operations / elapsed / 1e9:8.1f} Gop/s {share:7.0%}"
    )


def benchmark_linears(limits: tuple[float, float], kind: str, make: Callable[[int, int], nn.Module]) -> None:
    for name, (in_features, out_features) in LINEARS.items():
        weight_bytes = sum(part.nbytes for part in make(in_features, out_features).buffers())
        layers = [make(in_features, out_features) for _ in range(int(COLD_BYTES // weight_bytes) + 1)]
        for rows in ROWS:
            x = torch.randn(rows, in_features)
            elapsed = seconds(partial(apply_all, layers, x)) / len(layers)
            operations = 2 * rows * in_features * out_features
            size = f"{rows} x {in_features} -> {out_features}"
            report(f"{name} {kind}", size, elapsed, weight_bytes, operations, limits)


def in_bf16(in_features: int, out_features: int) -> nn.Module:
    return PackedLinear(torch.randn(out_features, in_features, dtype=torch.bfloat16))


def in_8_bits(in_features: int, out_features: int) -> nn.Module:
    scales = torch.rand(out_features, in_features // GROUP).half()
    return QuantizedLinear(Quantized(integers(out_features, in_features), scales))


def in_4_bits(in_features: int, out_features: int) -> nn.Module:
    integers = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales, minima = torch.rand(2, out_features, in_features // GROUP).half()
    return QuantizedLinear(Quantized(integers, scales, minima))


def apply_all(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def benchmark_attention(limits: tuple[float, float], dtype: torch.dtype, window: int = 0) -> None:
    for requests, query, context in (sizes for sizes in CONTEXTS if sizes[2] > window):
        blocks = context // BLOCK
        cache = [random_cache(requests * blocks, dtype) for _ in range(LAYERS)]
        tables = torch.randperm(requests * blocks).view(requests, blocks).int()
        index = tables, torch.arange(requests + 1).int() * query, torch.full((requests,), context).int()
        q = torch.randn(requests * query, HEADS, HEAD_DIM)
        elapsed = seconds(partial(attend_in_all_layers, q, cache, index, window)) / LAYERS
        most = window or context
        pairs = requests * sum(min(most, position + 1) for position in range(context - query, context))
        seen = min(context, most + query - 1) / context  # of the cache
        cache_bytes = sum(tensor.nbytes for tensor in cache[0] if tensor is not None) * seen
        size = f"{requests} x {query} of {context}" + (f", last {window}" if window else "")
        report(f"attn {str(dtype)[6:]}", size, elapsed, cache_bytes, pairs * HEADS * HEAD_DIM * 4, limits)


def random_cache(blocks: int, dtype: torch.dtype) -> LayerCache:
    shapes = kernels.kv_cache_shapes(torch.device("cpu"), blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype)
    if dtype.is_floating_point:
        return LayerCache(*(torch.randn(shape).to(dtype) for shape in shapes))
    elements = (torch.randint(-127, 128, shape, dtype=dtype) for shape in shapes)
    return LayerCache(*elements, *torch.rand(2, blocks, KV_HEADS, BLOCK) / 100)


def attend_in_all_layers(
    q: Tensor, cache: Sequence[LayerCache], index: tuple[Tensor, Tensor, Tensor], window: int
) -> None:
    for keys, values, key_scales, value_scales in cache:
        kernels.paged_attention(q, keys, values, *index, HEAD_DIM**-0.5, window, 0, None, key_scales, value_scales)


def benchmark_rows(limits: tuple[float, float]) -> None:
    for rows in (1, 16, 512):
        x, residual, weight = torch.randn(rows, 576), torch.randn(rows, 576), torch.ones(576)
        gate_up, qkv = torch.randn(rows, 3072), torch.randn(rows, 960)
        keys, values, *scales = random_cache(rows, torch.int16)
        index, table = torch.arange(rows), torch.randn(rows, HEAD_DIM)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "add_rms_norm": (partial(kernels.add_rms_norm, x, residual, weight, 1e-5), rows * 576 * 8),
            "gated silu": (partial(kernels.gated_activation, gate_up, "silu"), rows * 3072 * 4),
            "rotate+cache": (
                partial(kernels.rotate_and_cache, qkv, index, table, keys, values, index, HEADS, KV_HEADS, *scales),
                rows * 960 * 4,
            ),
        }
        for name, (call, bytes_read) in calls.items():
            report(name, f"{rows} rows", seconds(call), bytes_read, 0, limits)


def benchmark_steps() -> None:
    """Decode steps of an engine; what is not in native calls is scheduling, preparing and drawing."""
    engine = Engine.from_model(MODEL, EngineConfig(num_speculative_tokens=0, max_num_batched_tokens=max(STEP_ROWS)))
    model, native_seconds = engine.runner.model, [0.0]
    model.run_layers = timed(model.run_layers, native_seconds)  # type: ignore[method-assign]
    model.lm_head.forward = timed(model.lm_head.forward, native_seconds)  # type: ignore[method-assign]
    kernels.argmax = timed(kernels.argmax, native_seconds)
    for rows in STEP_ROWS:
        for i in range(rows):
            params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
            engine.add(Request(f"{rows}-{i}", [1000 + i, 2000 + i], params))
        while any(request.num_uncomputed_tokens > 1 for request in engine.scheduler.requests.values()):
            engine.step()
        steps = [in_one_step(engine, native_seconds) for _ in range(20)]
        whole, inside = sorted(steps)[len(steps) // 2]
        print(f"step         {rows:3} rows {whole * 1e3:8.2f} ms, outside of native calls {1 - inside / whole:6.1%}")
        for request in list(engine.scheduler.requests):
            engine.abort(request)


def benchmark_prefill() -> None:
    """A prompt in the engine beside the products of integers that its layers are made of, in turn."""
    config = EngineConfig(enable_prefix_caching=False, num_blocks=2 * PROMPT // BLOCK)
    engine = Engine.from_model(MODEL, config)
    products = [partial(torch._int_mm, integers(PROMPT, k), integers(n, k).T) for k, n in LAYER * LAYERS]
    prefill_seconds(engine, 0)
    product_seconds(products)
    pairs = [(prefill_seconds(engine, number), product_seconds(products)) for number in range(1, 25)]
    per_token = 2 * sum(map(math.prod, LAYER)) * LAYERS
    with_head = 1 + 2 * math.prod(LINEARS["head"]) / per_token
    prompt, product = (PROMPT / statistics.median(times) for times in zip(*pairs, strict=True))
    shares = sorted(alone / whole for whole, alone in pairs)
    print(f"prompt       {PROMPT} tokens: {prompt:.0f} tokens/s; torch._int_mm: {per_token * product / 1e9:.0f} Gop/s")
    for matrices, factor in (("of the layers", 1.0), ("and the head of each token", with_head)):
        low, share, high = (part * factor for part in (shares[0], statistics.median(shares), shares[-1]))
        print(f"  so the matrices {matrices} at {product / factor:.0f} tokens/s: {share:.0%} [{low:.0%}-{high:.0%}]")


def product_seconds(products: Sequence[Callable[[], object]]) -> float:
    """Of all layers once, each with its own matrices, as in a step."""
    begin = time.perf_counter()
    for product in products:
        product()
    return time.perf_counter() - begin


def integers(rows: int, columns: int) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)


def prefill_seconds(engine: Engine, number: int) -> float:
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.add(Request(f"prompt-{number}", [1000 + 7 * i + number for i in range(PROMPT)], params))
    begin = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin


def timed(call: Callable[..., Tensor], total: list[float]) -> Callable[..., Tensor]:
    def wrapped(*arguments: object) -> Tensor:
        begin = time.perf_counter()
        result = call(*arguments)
        total[0] += time.perf_counter() - begin
        return result

    return wrapped


def in_one_step(engine: Engine, native_seconds: list[float]) -> tuple[float, float]:
    """Its seconds, and those of them in native calls."""
    native_seconds[0], begin = 0.0, time.perf_counter()
    engine.step()
    return time.perf_counter() - begin, native_seconds[0]


def main() -> None:
    torch.set_num_threads(native.num_threads())
    limits = read_bandwidth(), peak_operations()
    print(f"instruction set {native.isa()}, {native.num_threads()} threads; {native.why_unavailable()}")
    print(f"limits: read {limits[0] / 1e9:.1f} GB/s, fp32 product {limits[1] / 1e9:.0f} Gop/s")
    with torch.inference_mode():
        benchmark_linears(limits, "bf16", in_bf16)
        benchmark_linears(limits, "8", in_8_bits)
        benchmark_linears(limits, "4", in_4_bits)
        benchmark_attention(limits, torch.int16)
        benchmark_attention(limits, torch.int16, WINDOW)
        benchmark_attention(limits, torch.int8)
        benchmark_rows(limits)
    benchmark_steps()
    benchmark_prefill()


if __name__ == "__main__":
    main()
