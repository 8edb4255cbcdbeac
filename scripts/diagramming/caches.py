"""Key-value caches: their bytes from caches as models make them; what they cost in loss and speed, from committed results."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.tables import plural, size
from scripts.diagramming.canvas import INK, NEUTRAL, PALETTE, REC, SOFT, STD, VALUE, panels, pointed_out, rows_of, tint
from scripts.diagramming.sources import Sources, Waits, with_fewer_seeds
from scripts.frontier import joined

STUDY = "gpt2-kv-frontier-ablation"
TINY, TINY_DECODE = "gpt2-kv-frontier-ablation+tiny", "decode.json"
TRAINED = "gpt2-kv-frontier-ablation+local+brief"
DECODE, DECODE_FILE = "bench-decode", "h100-blocks.json"
COMPRESSED_FILE = "h100-splice.json"  # the compressed caches at the larger batch, on the same GPU
COLOURS = {"keys": STD, "values": VALUE, "latents": REC, "index": PALETTE[3]}
KINDS = {"baseline": (NEUTRAL, "o"), "latents": (REC, "s"), "pruned or compressed": (VALUE, "D")}
HATCHES = {"keys": "", "values": "//", "latents": "\\\\", "index": "xx"}


def cache_compression(sources: Sources) -> Figure:
    """Bytes of one sequence's cache by step and by what they hold, in a 2-byte type, as a built model allocates them."""
    import torch

    steps = sources.steps(STUDY)
    parts = {step: sources.model(STUDY, step).new_cache(1, dtype=torch.bfloat16).parts() for step in steps}
    whole = {step: sum(held.values()) for step, held in parts.items()}
    base = sources.baseline(STUDY)
    context = sources.configuration(STUDY, base).GPT2_BLOCK_SIZE
    figure, (ax,) = panels("Size of the key-value cache", f"One sequence of {context:,} tokens, 2 bytes a number, 124M; from "
                           "the tensors of the caches of built models.", 1.9 + 0.36 * len(steps), left=2.3, right=1.55, top=0.3)
    rows_of(ax, steps)
    for row, step in enumerate(steps):
        at = 0.0
        for name, held in parts[step].items():
            mib = held / 2 ** 20
            colour = COLOURS.get(name, NEUTRAL)
            ax.barh(row, mib, left=at, height=0.62, facecolor=tint(colour, 0.45), edgecolor=colour, hatch=HATCHES.get(name, ""),
                    linewidth=0.8)
            at += mib
        saved = 1 - whole[step] / whole[base]
        less = "" if step == base else f"  \N{MINUS SIGN}{saved:.1%}"
        ax.text(1.02, row, size(whole[step]) + less, va="center", fontsize=9.5,
                transform=ax.get_yaxis_transform())
    ax.set_xlabel("MiB")
    names = dict.fromkeys(name for held in parts.values() for name in held)
    _legend(figure, [Patch(facecolor=tint(COLOURS.get(n, NEUTRAL), 0.45), edgecolor=COLOURS.get(n, NEUTRAL), label=n,
                           hatch=HATCHES.get(n, "")) for n in names])
    return figure


def _legend(figure: Figure, handles: list) -> None:
    figure.legend(handles=handles, loc="upper left", ncols=len(handles), frameon=False, fontsize=9.5, borderaxespad=0,
                  bbox_to_anchor=(0.012, 1 - 0.64 / figure.get_figheight()))


def speeds(record: dict, batch: int) -> dict[str, dict]:
    """{step: row} of what make bench-decode measured at this batch."""
    return {row["step"]: row for row in record["rows"] if row["batch"] == batch and not row["error"]}


def device(record: dict) -> str:
    """The device's short name."""
    return record["environment"]["device"].replace("NVIDIA ", "").split(" @")[0].replace("(R)", "").replace(" Processor", "")


def quality_speed_tradeoff(sources: Sources) -> Figure:
    """Final validation loss against decoding speed, of both sizes at which both are committed."""
    figure, axes = panels("Quality and decoding speed", "Right and down is better. Speed: beside the baseline's; on the GPU of "
                          "pruned caches between two borders.", 7.2, rows=2, left=0.85, right=2.4, space=(0, 0.42), top=0.5,
                          heights=(4, 3))
    of_both = (TINY, TINY, [TINY_DECODE]), (TRAINED, DECODE, [DECODE_FILE, COMPRESSED_FILE])
    for ax, (results, decode, files) in zip(axes, of_both, strict=True):
        report = sources.read(results, "report.json")
        record = joined({sources.results / decode / file: sources.read(decode, file) for file in files})
        batch = max(record["batches"])
        measured = speeds(record, batch)
        base = report["baseline"]
        points, looks, most = [], {}, max(step["seeds_done"] for step in report["steps"])
        for step in report["steps"]:
            name = step["name"]
            row = measured.get(record["baseline"] if name == base else name)
            if row and step["mean"]["val_loss"] is not None:
                label = with_fewer_seeds(step, most)
                points.append((row["speed"], step["mean"]["val_loss"], label))
                looks[label] = KINDS["baseline" if name == base else
                                    "latents" if "latents" in step["kv_cache"]["parts"] else "pruned or compressed"]
        if not points:
            raise Waits(f"docs/results/{decode}/{files[0]} with steps of {results}")
        pointed_out(ax, points, looks)
        ax.set(xlabel=f"decoding speed over {base}'s", ylabel="validation loss (nats)")
        ax.set_title(f"{'tiny' if 'tiny' in results else '124M'}, {most} seeds; speed on "
                     f"{device(record)}, {batch} sequences of {record['contexts'][0]} tokens", fontsize=10, color=INK)
        ax.grid(linewidth=0.6)
    _legend(figure, [Line2D([], [], color=colour, marker=marker, linestyle="", label=kind)
                     for kind, (colour, marker) in KINDS.items()])
    return figure


def inference_speed(sources: Sources) -> Figure:
    """Decoding speed by kind of cache, at each measured batch; of the caches that were measured at all of them."""
    record = sources.read(DECODE, DECODE_FILE)
    batches = record["batches"]
    by_batch: dict[int, dict[str, Any]] = {batch: speeds(record, batch) for batch in batches}
    steps = [step for step in dict.fromkeys(row["step"] for row in record["rows"]) if all(step in by_batch[b] for b in batches)]
    base = record["baseline"]
    figure, axes = panels("Decoding speed by cache", f"124M on one {device(record)}, {record['contexts'][0]:,} tokens, "
                          f"{record['dtype']}; ratios to {base} in the same run, median and range of "
                          f"{record['rounds']} rounds.",
                          1.75 + 0.36 * len(steps), columns=len(batches), left=1.15, right=0.9, space=(0.36, 0), top=0.15)
    for ax, batch in zip(axes, batches, strict=True):
        rows_of(ax, steps)
        for row, step in enumerate(steps):
            known = by_batch[batch][step]
            colour = NEUTRAL if step == base else STD
            ax.plot([known["speed_min"], known["speed_max"]], [row] * 2, color=colour, linewidth=2)
            ax.plot(known["speed"], row, "o", color=colour, markersize=7)
            ax.text(1.02, row, f"{known['tokens_per_second']:,.0f}/s", va="center", fontsize=9,
                    transform=ax.get_yaxis_transform())
        ax.axvline(1, color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        ax.set(xlabel=f"tokens/s over {base}'s")
        ax.set_title(plural(batch, "sequence"))
    for ax in axes[1:]:
        ax.set_yticklabels([])
    return figure
