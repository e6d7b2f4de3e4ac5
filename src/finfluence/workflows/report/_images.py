"""Thumbnails: from encoded images in the sample table, or from the tensors of a recipe's data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finfluence.errors import FinfluenceError
from finfluence.runs.pooling import Recorded
from finfluence.workflows.report._columns import Cuts, SampleColumns
from finfluence.workflows.report._packing import Budget, Payload

_LARGEST = 40  # pixels on the longer side
_FILE_LIMIT = 16_384  # of one encoded image


def pack_images(
    payload: Payload,
    run: Recorded,
    columns: SampleColumns,
    *,
    order: NDArray[np.int64],
    images: Any,
    budget: Budget,
    cuts: Cuts,
) -> bool:
    """Put thumbnails into the payload, of as many rows as fit, the first of `order` first.

    Args:
        payload: to fill.
        run: whose recipe may rebuild the images.
        columns: the sample table, which may hold encoded images.
        order: (n,) codes, the rows at both ends first.
        images: the caller's own: anything that gives an (h, w), (c, h, w) or (h, w, c) array by position; or None.
        budget: of the page.
        cuts: collects what did not fit.

    Returns:
        Whether there are any.
    """
    if images is None and columns.images is not None:
        return _pack_files(payload, columns.frame[columns.images].to_list(), order, budget.files, cuts)
    shape = None
    if images is None and not columns.texts:
        # a data set of texts has nothing to draw, and may be slow to rebuild
        images, shape = _recipe_images(run)
    if images is None:
        return False
    first = _pixels(images[int(order[0])], shape)
    if first is None:
        return False
    count = min(len(order), max(1, budget.pixels // first.size))
    shown = order[:count]
    pixels = [_pixels(images[int(code)], shape) for code in shown]
    if any(one is None or one.shape != first.shape for one in pixels):
        return False
    stack = np.stack([one for one in pixels if one is not None])
    payload.array("pixels", _bytes(stack), "uint8")
    payload.json("thumbnails", {"kind": "pixels", "shape": list(first.shape), "rows": shown.tolist()})
    _note(cuts, count, len(order))
    return True


def _pack_files(
    payload: Payload, files: Sequence[bytes | None], order: NDArray[np.int64], room: int, cuts: Cuts
) -> bool:
    rows: list[int] = []
    offsets = [0]
    for code in order.tolist():
        data = files[code]
        if not data or len(data) > _FILE_LIMIT:
            continue
        if offsets[-1] + len(data) > room:
            break
        rows.append(code)
        offsets.append(offsets[-1] + len(data))
    payload.raw("files", b"".join(files[code] or b"" for code in rows))
    payload.json("thumbnails", {"kind": "files", "offsets": offsets, "rows": rows})
    _note(cuts, len(rows), sum(data is not None for data in files))
    return bool(rows)


def _note(cuts: Cuts, count: int, total: int) -> None:
    if count < total:
        cuts.notes.append(f"{count:,} of {total:,} images have a thumbnail, those of lowest and highest μ first.")


def _recipe_images(run: Recorded) -> tuple[Any, tuple[int, ...] | None]:
    reference = run.manifest.get("recipe")
    if not reference:
        return None, None
    from finfluence.workflows.recipes import load_recipe

    # A page without thumbnails is worth having where the recipe's module or data cannot be had.
    try:
        recipe = load_recipe(reference)
        if len(recipe.dataset) != run.samples().height:
            return None, None
    except (FinfluenceError, OSError, TypeError, ValueError, ImportError):
        return None, None
    shape = getattr(recipe, "image_shape", None)
    return recipe.dataset, tuple(shape) if shape else None


def _pixels(item: Any, shape: tuple[int, ...] | None) -> NDArray[np.float32] | None:
    """One sample as (h, w, c) with c = 1 or 3, shrunk to a thumbnail; None where it is no image."""
    if isinstance(item, tuple | list) and item:
        item = item[0]
    elif isinstance(item, dict):
        item = next((item[name] for name in ("pixel_values", "image") if name in item), None)
    if not hasattr(item, "shape") or not hasattr(item, "__array__"):
        return None
    image = np.asarray(item)
    if not np.issubdtype(image.dtype, np.number):
        return None
    if shape is not None and image.size == int(np.prod(shape)):
        image = image.reshape(shape)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = np.moveaxis(image, 0, 2)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or min(image.shape[:2]) < 4:
        return None
    return _shrink(image.astype(np.float32))


def _shrink(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over blocks, so that the longer side has at most `_LARGEST` pixels."""
    step = -(-max(image.shape[:2]) // _LARGEST)
    if step == 1:
        return image
    height, width = (max(1, side // step) for side in image.shape[:2])
    return image[: height * step, : width * step].reshape(height, step, width, step, -1).mean((1, 3))


def _bytes(stack: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Grey values from 0 to 255: as they are, from 0…1, or between the extremes of what is shown."""
    low, high = float(np.nanmin(stack)), float(np.nanmax(stack))
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and 1 < high <= 255 and high > 16:
        low, high = 0.0, 255.0
    scaled = (np.nan_to_num(stack) - low) / max(high - low, 1e-12) * 255
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
