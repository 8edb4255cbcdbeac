"""How much smaller a step's KV cache is than the baseline's: the values alone, the values with the index and importance that
pruning needs, and all bytes. The first two leave the keys out, which is why all three stand side by side.

Bytes are those the cells recorded, of the tensors that a cache of one sequence of the study's context holds, by what they
hold; means over finished seeds, since a learned share keeps another number of tokens each time. A share is null where one of
the two caches has no such part (a cache of latents has no values) or a record is older than its parts.
"""

from statistics import fmean

from lib.tables import Section, size

SHARES = ("values", "values_and_index", "kv_cache")


def savings(parts: dict, full: dict) -> dict[str, float | None]:
    """By which share a cache of these bytes by part is smaller than `full`, e.g. {"keys": 8, "values": 8}."""
    values, whole = parts.get("values"), full.get("values")
    known = values is not None and bool(whole)
    return {"values": 1 - values / whole if known else None,
            "values_and_index": 1 - (values + parts.get("index", 0)) / (whole + full.get("index", 0)) if known else None,
            "kv_cache": 1 - sum(parts.values()) / sum(full.values()) if any(full.values()) else None}


def compared(records: list[dict], baseline: list[dict]) -> dict:
    """A step's cache beside the baseline's, of their finished cells: bytes and parts of both, and `smaller`, the shares of
    SHARES; that is null where the two are the same, or one is not known."""
    (own, parts), (base, full) = _mean(records), _mean(baseline)
    smaller = None
    if own is not None and base and (own != base or (parts and full and parts != full)):
        smaller = savings(parts or {}, full or {}) | {"kv_cache": 1 - own / base}
    return {"bytes": own, "parts": parts, "baseline_bytes": base, "baseline_parts": full, "smaller": smaller}


def _mean(records: list[dict]) -> tuple[float | None, dict | None]:
    """Mean bytes, and mean bytes by part; None if a record does not have them."""
    whole, parts = ([record[key] for record in records] for key in ("kv_cache_bytes", "kv_cache_parts"))
    names = dict.fromkeys(name for one in parts for name in one or ())
    return (fmean(whole) if whole and None not in whole else None,
            {name: fmean(one.get(name, 0) for one in parts) for name in names} if parts and None not in parts else None)


def rows(steps: list[dict]) -> list[dict]:
    """The steps of a report whose cache differs from the baseline's."""
    return [step for step in steps if (step.get("kv_cache") or {}).get("smaller")]


HEADER = ["step", "cache", "baseline's", "values", "values, index and importance", "whole KV cache"]
CAPTION = ("Bytes of the cache of one sequence of the study's context, and by how much it is smaller than the baseline's, "
           "part by part.")


def cells(step: dict) -> list[str]:
    """A row as text, in the order of HEADER."""
    cache = step["kv_cache"]
    return [step["name"], size(cache["bytes"]), size(cache["baseline_bytes"]),
            *(_shown(cache["smaller"][key]) for key in SHARES)]


def _shown(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share >= 0 else f"{-100 * share:.1f} % larger"


def section(content: dict) -> Section | None:
    """What a report shows of it; None if every step has the baseline's cache."""
    found = rows(content.get("steps") or [])
    return Section("KV cache", CAPTION, HEADER, "lrrrrr", [cells(step) for step in found]) if found else None
