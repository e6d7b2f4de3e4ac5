"""Runs to report on: small ones with awkward samples and a large synthetic one, written straight into the store."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import finfluence as fi
from finfluence.signals import SignalWriter
from finfluence.tradeoff import SIGN_CONVENTION

_KINDS = {"float32": "f4", "int32": "i4", "uint32": "u4", "uint16": "u2", "uint8": "u1"}


# What `verify` writes about a cut of five rows.
VERIFIED: dict[str, Any] = {
    "query": "validation",
    "name": "cut",
    "size": 5,
    "ids_hash": "0",
    "k": 5,
    "predicted": {"mu": -2.0, "se": 0.5},
    "measured": {"mu": -1.8, "se": 0.2, "ci_low": -2.2, "ci_high": -1.4},
    "runs": 32,
}


def synthetic_run(
    directory: Path,
    samples: pl.DataFrame,
    *,
    queries: tuple[str, ...] = ("validation",),
    epochs: int = 3,
    batch: int = 50,
    seed: int = 0,
    rerun: int = 0,
) -> fi.Run:
    """A finished live run whose signals are random: each sample has its own mean, every visit some noise.

    Reruns of a seed have its samples' means and noise of their own.
    """
    generator = np.random.default_rng(seed)
    n = samples.height
    ids = samples["sample"].to_numpy() if samples["sample"].dtype.is_integer() else samples["sample"].to_list()
    own = generator.standard_normal((n, len(queries))) * 1e-4
    generator = np.random.default_rng([seed, rerun]) if rerun else generator
    manifest: dict[str, Any] = {
        "sampler": "shuffled",
        "drop_last": True,
        "n_samples": n,
        "batch_size": batch,
        "epochs": epochs,
        "total_steps": epochs * (n // batch),
        "sensitivity": "live",
        "signals": "batch",
        "seed": rerun,
        "sign_convention": SIGN_CONVENTION,
    }
    id_dtype = "int64" if samples["sample"].dtype.is_integer() else "str"
    with SignalWriter.create(
        directory, queries=queries, id_dtype=id_dtype, manifest=manifest, samples=samples, buffer_rows=1 << 20
    ) as writer:
        step = 0
        for epoch in range(epochs):
            order = generator.permutation(n)
            for position in range(n // batch):
                rows = order[position * batch : (position + 1) * batch]
                values = own[rows] + 1e-4 * generator.standard_normal((batch, len(queries)))
                named = ids[rows] if isinstance(ids, np.ndarray) else [ids[row] for row in rows]
                writer.append_signals(step, named, values.astype(np.float32))
                writer.append_steps(
                    step=step,
                    epoch=epoch,
                    position=position,
                    learning_rate=0.1,
                    batch_size=batch,
                    loss=2.0 / (1 + 0.01 * step),
                    residual=1e-7,
                    scale=1.0,
                    nonfinite=False,
                    skipped=False,
                )
                step += 1
    return fi.open_run(directory)


def prose(count: int, *, seed: int, longest: int = 60) -> list[str]:
    """Random sentences of words that repeat as they do in a language (Zipf)."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(2, 10, 4000)]
    lengths = generator.integers(8, longest, count)
    drawn = np.minimum(generator.zipf(1.3, int(lengths.sum())) - 1, len(words) - 1)
    ends = np.cumsum(lengths)
    return [" ".join(words[i] for i in drawn[end - size : end]) for end, size in zip(ends, lengths, strict=True)]


def payload_of(page: str) -> dict[str, Any]:
    """What a page holds for its script, decoded without a browser."""
    found = re.search(r'<script type="text/plain" id="payload">([^<]*)</script>', page)
    assert found is not None
    packed = zlib.decompress(base64.b64decode(found.group(1)))
    length = int.from_bytes(packed[:4], "little")
    index, body = json.loads(packed[4 : 4 + length]), packed[4 + length :]
    decoded: dict[str, Any] = {}
    for name, entry in index.items():
        at, count = entry["at"], entry["count"]
        if entry["type"] in ("json", "bytes"):
            data = body[at : at + count]
            decoded[name] = json.loads(data) if entry["type"] == "json" else data
            continue
        kind = np.dtype(_KINDS[entry["type"]]).newbyteorder("<")
        planes = np.frombuffer(body, np.uint8, count * kind.itemsize, at).reshape(kind.itemsize, count)
        decoded[name] = np.ascontiguousarray(planes.T).view(kind).ravel()
    return decoded


def png(grey: int) -> bytes:
    """A 4 × 4 picture of one grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (4).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = b"".join(b"\0" + bytes([grey] * 4) for _ in range(4))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
