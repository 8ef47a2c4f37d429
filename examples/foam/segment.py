"""Tell pores from metal in a CT volume of foam.

A median filter over 3³ voxels takes the noise away, Otsu's threshold (IEEE Transactions on
Systems, Man, and Cybernetics 9, 1979) parts dark from bright, and a binary closing of the metal
mends thin walls and removes specks of air.

Writes ``NAME_segmented.npy``: 8-bit, same shape as the volume, 1 in pores and 0 in metal. It
appears under that name only when whole. Memory: about four times that of the volume.
"""

from __future__ import annotations

import argparse
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Grey = NDArray[np.integer]


def read_volume(path: Path) -> Grey:
    """Return the grey values, left on the disk until they are looked at."""
    try:
        volume = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise SystemExit(f"segment: cannot read the volume {path}: {error}") from error
    if volume.ndim != 3 or volume.dtype.kind not in "iu":
        raise SystemExit(
            f"segment: {path} is not a volume: expected whole grey values in 3 dimensions, "
            f"found {volume.dtype} in {volume.ndim}"
        )
    return volume


def find_pores(volume: Grey) -> NDArray[np.bool_]:
    """Return where the pores are."""
    from skimage.filters import threshold_otsu  # noqa: PLC0415 - slow to import; --help need not

    smooth = ndimage.median_filter(volume, size=3)
    if smooth.min() == smooth.max():
        raise SystemExit(f"segment: the volume has one grey value only, {smooth.flat[0]}")
    metal = smooth > threshold_otsu(smooth)
    # Two steps rather than binary_closing, which eats metal at the faces of the volume: what lies
    # outside must neither grow into the volume nor eat from it.
    grown = ndimage.binary_dilation(metal)
    pores: NDArray[np.bool_] = ~ndimage.binary_erosion(grown, border_value=1)
    return pores


def main(argv: list[str] | None = None) -> None:
    """Segment one volume."""
    parser = argparse.ArgumentParser(
        description="Tell pores from metal in a CT volume and write NAME_segmented.npy "
        "(8-bit; 1 in pores, 0 in metal)."
    )
    parser.add_argument("volume", type=Path, help="grey values in 3 dimensions, .npy")
    parser.add_argument("--into", type=Path, required=True, help="folder to write to; made if new")
    arguments = parser.parse_args(argv)
    pores = find_pores(read_volume(arguments.volume))
    name = arguments.volume.stem
    whole = arguments.into / f"{name}_segmented.npy"
    part = whole.with_suffix(".npy.part")
    try:
        arguments.into.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                np.save(stream, pores.astype(np.uint8))
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"segment: cannot write the segmented volume: {error}") from error
    print(f"{whole}  {pores.mean():.3f} of the voxels are pores")


if __name__ == "__main__":
    main()
