"""Measure the pores of a segmented CT volume of foam.

The distance of each pore voxel from the metal has its maxima in the middle of the pores; from
there a watershed parts pores that touch or overlap. Each pore is taken for a sphere of the volume
it fills, so its radius is ∛(3 V / 4π). Of pores that overlap each gets its side of the cut, and
two that share most of their space count as one. Pores cut by the faces of the volume are counted,
but have no radius: how far they reach is not known.

Writes ``NAME_pores.json`` (``porosity``, ``number_of_pores`` with those cut, ``mean_radius`` and
``radii`` of the whole ones in voxels, ``mean_radius`` null if there is none) and
``NAME_pores.png``, two views of the middle slice and the histogram of the radii. Memory: about 17
times that of the volume.
"""

from __future__ import annotations

import argparse
import json
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Whole = NDArray[np.integer]

SMOOTHING = 0.7  # voxels; without it the rough surface of one pore can make two maxima
APART = 3  # voxels between the middles of two pores, at least
SMALLEST_RADIUS = 2.0  # voxels; what is smaller is noise
METAL, CUT = "#f4f2ee", "#c4c0b8"  # colours in the figure


def read_volume(path: Path) -> Whole:
    """Return the values, left on the disk until they are looked at."""
    try:
        volume = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise SystemExit(f"analyse_pores: cannot read the volume {path}: {error}") from error
    if volume.ndim != 3 or volume.dtype.kind not in "iu":
        raise SystemExit(
            f"analyse_pores: {path} is not a volume: expected whole values in 3 dimensions, "
            f"found {volume.dtype} in {volume.ndim}"
        )
    return volume


def distance_to_metal(pores: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how far each voxel is from the metal, in voxels."""
    # From the places of the nearest metal: asked for distances, SciPy takes twice the memory.
    nearest = ndimage.distance_transform_edt(pores, return_distances=False, return_indices=True)
    squared = np.zeros(pores.shape, np.float32)
    for axis, place in enumerate(nearest):
        here = np.arange(pores.shape[axis], dtype=place.dtype)
        here = np.expand_dims(here, [other for other in range(3) if other != axis])
        squared += np.square(np.subtract(place, here, out=place), out=place)
    return np.sqrt(squared, out=squared)


def separate(pores: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the number of the pore each voxel belongs to, from 1; 0 is metal."""
    from skimage.feature import peak_local_max  # noqa: PLC0415 - slow to import; --help need not
    from skimage.segmentation import watershed  # noqa: PLC0415

    distance = ndimage.gaussian_filter(distance_to_metal(pores), SMOOTHING)
    middles = peak_local_max(
        distance, min_distance=APART, threshold_abs=SMALLEST_RADIUS, exclude_border=False
    )
    seeds = np.zeros(pores.shape, np.int32)
    seeds[tuple(middles.T)] = np.arange(1, len(middles) + 1)
    labels: NDArray[np.int32] = watershed(-distance, seeds, mask=pores)
    return labels


def measure(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return each pore's radius in voxels by its number; NaN if it is cut, and for the metal."""
    radii = np.cbrt(np.bincount(labels.ravel()) * 3 / (4 * np.pi))
    for axis in range(3):
        for face in (0, -1):
            radii[np.take(labels, face, axis)] = np.nan
    radii[0] = np.nan
    return radii


def draw(
    title: str, volume: Whole, labels: NDArray[np.int32], radii: NDArray[np.float64]
) -> Figure:
    """Return a figure of the middle slice, as scanned and with its pores, and the radii."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415 - slow to import; --help need not
    from matplotlib.colors import Normalize, to_rgb  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415 - without pyplot: needs no display
    from skimage.segmentation import find_boundaries  # noqa: PLC0415

    known = radii[~np.isnan(radii)]
    low, high = (np.floor(known.min()), np.floor(known.max()) + 1) if known.size else (0, 1)
    by_radius = ScalarMappable(Normalize(low, high), "viridis")
    middle = len(volume) // 2

    figure = Figure(figsize=(14, 4.6), dpi=110)
    figure.set_layout_engine("constrained", wspace=0.06, h_pad=0.08)
    scan, found, histogram = figure.subplots(1, 3, width_ratios=(1, 1.22, 1.1))
    figure.suptitle(title, fontsize="x-large")

    grey = volume[middle]
    scan.imshow(grey, cmap="gray", vmin=np.percentile(grey, 1), vmax=np.percentile(grey, 99))
    scan.set_title(f"scan, slice z = {middle}")

    colours = by_radius.to_rgba(np.nan_to_num(radii, nan=low))[:, :3]
    colours[np.isnan(radii)] = to_rgb(CUT)
    colours[0] = to_rgb(METAL)
    picture = colours[labels[middle]]
    picture[find_boundaries(labels[middle], mode="inner")] *= 0.6
    found.imshow(picture)
    found.set_title("pores found in it")
    figure.colorbar(by_radius, ax=found, label="pore radius (voxels); grey: cut by a face")
    for axes in (scan, found):
        axes.set(xlabel="x (voxels)", ylabel="y (voxels)")

    _, edges, bars = histogram.hist(known, bins=20, range=(low, high), edgecolor="white")
    for bar, left, right in zip(bars, edges, edges[1:], strict=False):
        bar.set_facecolor(by_radius.to_rgba((left + right) / 2))
    mean = ""
    if known.size:
        histogram.axvline(known.mean(), color="black", linestyle="--")
        mean = f"\nmean radius {known.mean():.2f} voxels (dashed)"
    histogram.set(xlabel="pore radius (voxels)", ylabel="number of pores")
    histogram.set_title(f"{known.size} whole pores{mean}")
    histogram.yaxis.get_major_locator().set_params(integer=True)
    histogram.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Analyse one volume."""
    parser = argparse.ArgumentParser(
        description="Measure the pores of a segmented CT volume and write NAME_pores.json and "
        "NAME_pores.png, NAME being that of the volume."
    )
    parser.add_argument("segmented", type=Path, help="1 in pores, 0 in metal, .npy of segment.py")
    parser.add_argument("--volume", type=Path, required=True, help="the volume it was made from")
    parser.add_argument("--into", type=Path, required=True, help="folder to write to; made if new")
    arguments = parser.parse_args(argv)
    segmented, volume = read_volume(arguments.segmented), read_volume(arguments.volume)
    if segmented.shape != volume.shape:
        raise SystemExit(
            f"analyse_pores: {arguments.segmented} has the shape {segmented.shape}, "
            f"{arguments.volume} {volume.shape}: they do not belong together"
        )
    if segmented.min() != 0 or segmented.max() > 1:
        raise SystemExit(
            f"analyse_pores: {arguments.segmented} is not a segmented volume: expected 0 for "
            f"metal and 1 for pores, found {segmented.min()} to {segmented.max()}"
        )
    pores = segmented != 0
    labels = separate(pores)
    radii = measure(labels)
    known = np.sort(radii[~np.isnan(radii)])
    name = arguments.volume.stem
    result = {
        "volume": name,
        "porosity": round(float(pores.mean()), 4),
        "number_of_pores": len(radii) - 1,
        "mean_radius": round(float(known.mean()), 3) if known.size else None,
        "radii": known.round(3).tolist(),
    }
    told = f"{result['number_of_pores']} pores, porosity {result['porosity']}"
    try:
        arguments.into.mkdir(parents=True, exist_ok=True)
        draw(f"{name}: {told}", volume, labels, radii).savefig(arguments.into / f"{name}_pores.png")
        text = json.dumps(result, indent=1) + "\n"
        (arguments.into / f"{name}_pores.json").write_text(text)
    except OSError as error:
        raise SystemExit(f"analyse_pores: cannot write the results: {error}") from error
    print(f"{name}  {told}")


if __name__ == "__main__":
    main()
