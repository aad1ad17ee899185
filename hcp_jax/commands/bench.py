"""Run `hcp bench attention`: compare the speed of attention implementations on this GPU.

All implementations run in one process on the same random data, forward alone and forward with
backward; the time of backward is the difference. FLOPs are those that the mask needs, as the
literature counts them: 4 H per head and visible (query, key) pair, half of T² pairs under a causal
mask, and 2.5 times as many in backward. So computing masked pairs does not raise the figure.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import subprocess
import time
from typing import Any, NamedTuple

from hcp_jax.base import arguments, tables, terminal

CONTESTANTS = ("mosaic", "triton", "blockwise", "cudnn", "xla")
MASKS = ("causal", "full", "packed")
_LONGEST_ON_CPU = 2048


class Setting(NamedTuple):
    """A mask with a shape."""

    mask: str
    length: int
    pairs: float  # visible to each head


class Row(NamedTuple):
    """One line of the table; seconds are medians, None where not supported."""

    contestant: str
    mask: str
    length: int
    forward_seconds: float | None
    backward_seconds: float | None
    forward_tflops: float | None
    backward_tflops: float | None
    note: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp bench`."""
    parser.add_argument("what", choices=("attention",), help="what to time")
    parser.add_argument(
        "--length", type=arguments.length, default=16384, help="tokens, dense masks"
    )
    parser.add_argument(
        "--stream", type=arguments.length, default=65536, help="tokens, packed documents"
    )
    parser.add_argument(
        "--document", type=arguments.length, default=4096, help="tokens of a packed document"
    )
    parser.add_argument("--heads", type=arguments.whole(most=2**16), default=16)
    parser.add_argument("--kv-heads", type=arguments.whole(most=2**16), default=16)
    parser.add_argument("--head-size", type=arguments.whole(most=2**16), default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--repeats",
        type=arguments.whole(most=10**6),
        default=30,
        help="number of timings; the median counts (30)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time alternative Triton tiles instead, and keep the fastest: attention on this kind "
        "of GPU takes them for this dtype and head size",
    )
    parser.add_argument(
        "--output",
        type=arguments.writable_folder,
        default=pathlib.Path("benchmarks/results"),
        help="the folder that the table and its plot are written to",
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp bench`: time, print the table, and write it as JSON and as a plot."""
    import jax

    if args.heads % args.kv_heads:
        raise ValueError(
            f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}: query heads "
            "share kv heads in equal groups."
        )
    settings = [_setting(args, mask) for mask in args.masks]
    device = jax.devices()[0]
    longest = max(args.stream if mask == "packed" else args.length for mask in args.masks)
    if device.platform == "cpu" and longest > _LONGEST_ON_CPU:
        raise ValueError(
            f"there is no GPU, and {longest} tokens would take hours on a CPU; to try the command, "
            f"give --length and --stream of at most {_LONGEST_ON_CPU} (and --document)."
        )
    time_rows = _sweep if args.sweep else _compare
    rows = time_rows(args, settings)
    terminal.say(
        f"{device.device_kind}, jax {jax.__version__}, {args.dtype}, head size {args.head_size}"
    )
    _print(rows)
    args.output.mkdir(parents=True, exist_ok=True)
    kind = device.device_kind.replace(" ", "-").lower()
    path = args.output / f"attention-{'sweep-' if args.sweep else ''}{kind}.json"
    options = {k: v for k, v in vars(args).items() if isinstance(v, int | str | list)}
    facts = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "options": options,
    }
    path.write_text(json.dumps(facts | {"rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    _plot(rows, path.with_suffix(".png"), device.device_kind)
    terminal.say(f"written: {path} and {path.with_suffix('.png')}")
    return 0


def _commit() -> str | None:
    """Return the commit of the package; None if it is not in a git checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() or None


def _setting(args: argparse.Namespace, mask: str) -> Setting:
    if mask == "packed":
        if args.stream % args.document:
            raise ValueError(
                f"--stream {args.stream} is not a multiple of --document {args.document}; "
                "give a stream of whole documents."
            )
        documents = args.stream // args.document
        return Setting(mask, args.stream, documents * args.document**2 / 2)
    return Setting(mask, args.length, args.length**2 / (2 if mask == "causal" else 1))


def _compare(args: argparse.Namespace, settings: list[Setting]) -> list[Row]:
    return [
        _row(args, setting, contestant, contestant)
        for setting in settings
        for contestant in args.contestants
    ]


def _sweep(args: argparse.Namespace, settings: list[Setting]) -> list[Row]:
    """Time each tile size for all three kernels; the table has forward and backward columns."""
    import jax

    from hcp_jax.kernels.tiles import Tile, Tiles, tiles_for

    kind = "" if (device := jax.devices()[0]).platform == "cpu" else device.device_kind
    table = tiles_for(kind, args.dtype, args.head_size, args.head_size)
    contestants = {"the table's": table}
    for block_q, block_k in ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128)):
        for warps in (4, 8):
            for stages in (2, 3):
                tile = Tile(block_q, block_k, warps, stages)
                name = f"{block_q}×{block_k}, {warps} warps, {stages} stages"
                contestants[name] = Tiles(tile, tile, tile)
    timed = [
        (tiles, [_row(args, setting, "triton", name, tiles) for setting in settings])
        for name, tiles in contestants.items()
    ]
    _keep_fastest(args, timed)
    return [row for _, rows in timed for row in rows]


def _keep_fastest(args: argparse.Namespace, timed: list[tuple[Any, list[Row]]]) -> None:
    """Keep the tiles with the fewest seconds over all masks, if they compute the right values."""
    import jax

    from hcp_jax.kernels import kept_tiles, self_check

    device = jax.devices()[0]
    if device.platform == "cpu":
        terminal.say("no tiles are kept: without a GPU their times mean nothing")
        return
    tiles = _fastest(timed)
    if tiles is None:
        terminal.say("no tiles are kept: none computed every mask")
        return
    sizes = (args.head_size,)
    try:
        found = list(self_check.findings("triton", head_sizes=sizes, dtype=args.dtype, tiles=tiles))
        reason = next((f"{x.result} of {x.case} is wrong" for x in found if not x.passed), None)
    except Exception as error:  # such as too much shared memory with a soft cap
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    if reason is not None:
        terminal.say(f"no tiles are kept: the fastest, {tiles}, fail their check: {reason}")
    elif kept_tiles.keep("triton", device.device_kind, args.dtype, args.head_size, tiles):
        terminal.say(
            f"attention takes these tiles from now on, kept in {kept_tiles.path()}: {tiles}"
        )


def _fastest(timed: list[tuple[Any, list[Row]]]) -> Any:
    """Return the fastest tile for forward, with the fastest ones for backward; None if none ran."""
    from hcp_jax.kernels.tiles import Tiles

    # (forward, backward, tiles); a backward of no time at all is noise.
    seconds = [
        (
            sum(row.forward_seconds or 0.0 for row in rows),
            sum(row.backward_seconds or 0.0 for row in rows),
            tiles,
        )
        for tiles, rows in timed
        if all((row.backward_seconds or 0.0) > 1e-9 for row in rows)
    ]
    if not seconds:
        return None
    forward = min(seconds, key=lambda x: x[0])[2]
    backward = min(seconds, key=lambda x: x[1])[2]
    return Tiles(forward.forward, backward.dq, backward.dkv)


def _row(
    args: argparse.Namespace, setting: Setting, contestant: str, name: str, tiles: Any = None
) -> Row:
    import jax

    try:
        attention = _attention(args, setting, contestant, tiles)
        forward = _seconds(jax.jit(attention), args, setting)
        both = _seconds(jax.jit(_with_gradients(attention)), args, setting, gradients=True)
    except Exception as error:  # an implementation that fails is a line of the table
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        return Row(name, setting.mask, setting.length, None, None, None, None, reason)
    flops = 4 * args.head_size * args.heads * setting.pairs
    backward = max(both - forward, 1e-9)
    return Row(
        *(name, setting.mask, setting.length, forward, backward),
        *(flops / forward / 1e12, 2.5 * flops / backward / 1e12, ""),
    )


def _attention(args: argparse.Namespace, setting: Setting, contestant: str, tiles: Any):
    """Return attention as a function of q, k and v, with the kernels' default tiles if None."""
    import jax
    import numpy as np

    import hcp_jax as hcp

    if contestant == "mosaic" and jax.devices()[0].platform == "cpu":
        raise NotImplementedError("it needs a GPU: JAX's interpreter would take hours")
    if contestant in ("mosaic", "triton", "blockwise"):
        mask = hcp.bidirectional() if setting.mask == "full" else hcp.causal()
        if setting.mask == "packed":
            ids = np.repeat(np.arange(setting.length // args.document), args.document)
            mask = mask & hcp.documents(ids)
        if tiles is not None:
            return functools.partial(_with_tiles, contestant, tiles, mask)
        return functools.partial(hcp.dot_product_attention, mask=mask, implementation=contestant)
    if setting.mask == "packed":
        raise NotImplementedError("jax.nn takes packed documents only as a dense T² mask")
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=setting.mask == "causal",
        implementation=contestant,
    )


def _with_tiles(implementation: str, tiles: Any, mask: Any, q, k, v):
    """Compute the public op on one device with the given tiles."""
    import jax
    import jax.numpy as jnp

    from hcp_jax.attention.local import LocalSpec, attention
    from hcp_jax.attention.ring import Ring
    from hcp_jax.kernels.core import CoreSpec
    from hcp_jax.parallel.peers import Peers
    from hcp_jax.sequence.placement import Streams

    device = jax.devices()[0]
    core = CoreSpec(
        implementation=implementation,
        scale=q.shape[3] ** -0.5,
        device_kind=device.device_kind,
        interpret=device.platform == "cpu",
        tiles=tiles,
    )
    length = k.shape[1]
    intervals = mask.intervals(q.shape[1], length, xp=jnp)
    spec = LocalSpec(core, Peers(), Ring())
    runs = Streams().source_runs(None, length, 1, 0, jnp)
    return attention(spec, q, k, v, intervals, None, runs, return_residual=False)[0]


def _with_gradients(attention: Any) -> Any:
    import jax

    def run(q, k, v, dout):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(dout)

    return run


def _seconds(function: Any, args: argparse.Namespace, setting: Setting, gradients=False) -> float:
    """Return the median seconds of a call; calls are made in a row, to hide their dispatch."""
    import jax

    heads = [args.heads, args.kv_heads, args.kv_heads, args.heads][: 3 + gradients]
    keys = jax.random.split(jax.random.key(0), len(heads))
    arrays = [
        jax.random.normal(key, (1, setting.length, n, args.head_size), args.dtype)
        for key, n in zip(keys, heads, strict=True)
    ]
    jax.block_until_ready(function(*arrays))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    in_a_row = max(1, min(50, round(0.02 / (time.perf_counter() - start))))
    timings = []
    for _ in range(args.repeats + 3):
        start = time.perf_counter()
        results = [function(*arrays) for _ in range(in_a_row)]
        jax.block_until_ready(results)
        timings.append((time.perf_counter() - start) / in_a_row)
        del results
    return statistics.median(timings[3:])


def _print(rows: list[Row]) -> None:
    cells = [
        (
            *(row.contestant, row.mask, str(row.length)),
            *(_figure(x, 1e3) for x in (row.forward_seconds, row.backward_seconds)),
            *(_figure(x, 1) for x in (row.forward_tflops, row.backward_tflops)),
        )
        for row in rows
    ]
    headings = ("", "mask", "tokens", "forward ms", "backward ms", "forward", "backward")
    console = tables.console()
    tables.show(console, headings, cells, left=("", "mask"), drop=("tokens", "mask"))
    console.print("forward and backward in TFLOP/s of what the mask asks for")
    for row in rows:
        if row.note:
            terminal.say(f"{row.contestant}, {row.mask}: {row.note}")


def _figure(x: float | None, factor: float) -> str:
    return "–" if x is None else f"{x * factor:.3g}"


def _plot(rows: list[Row], path: pathlib.Path, device_kind: str) -> None:
    from hcp_jax import viz

    rows = [row for row in rows if row.forward_tflops is not None]
    names = [f"{row.contestant}\n{row.mask}" for row in rows]
    forward = [row.forward_tflops or 0.0 for row in rows]
    backward = [row.backward_tflops or 0.0 for row in rows]
    viz.draw_rates(names, forward, backward, device_kind).savefig(path)
