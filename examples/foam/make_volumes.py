"""Make artificial X-ray CT volumes of aluminium foam whose pores are known exactly.

Each volume is a cube of bright metal with dark spherical pores, blurred over one voxel at their
surface and covered with noise, as 16-bit grey values. There are three kinds:

* ``separate``: no two pores overlap; at least two voxels of metal lie between them;
* ``mixed``: pores that overlap others occur beside such that do not;
* ``poor``: a few separate pores only, too few for an analysis to mean something.

``foam_000.npy`` holds the volume (axes z, y, x) and ``foam_000.json`` the truth: the spheres and
the porosity before the noise. The same arguments give the same bytes; files already there are
replaced, each in one step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Grey = NDArray[np.uint16]

RADII = 5.0, 11.0  # voxels, smallest and largest
WALL = 2.0  # voxels of metal between pores that do not overlap
POROSITY = {"separate": (0.17, 0.24), "mixed": (0.24, 0.36), "poor": (0.02, 0.05)}
SEPARATE_PART = 0.6  # of the pore space of a mixed volume
NOISE = 0.14  # standard deviation, as a part of the contrast between metal and air
TRIES = 400  # places tried for a pore before it is given up
GIVEN_UP = 20  # pores given up in a row before the volume counts as full


class Foam:
    """A block of metal that pores are cut out of, without noise yet."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self._metal = int(rng.integers(32_000, 40_000))  # no two scans are equally bright
        self._air = int(rng.integers(7_000, 11_000))
        self.grey: Grey = np.full((size, size, size), self._metal, np.uint16)
        self.centres: NDArray[np.float64] = np.empty((0, 3))
        self.radii: NDArray[np.float64] = np.empty(0)
        self._pore_voxels = 0

    @property
    def porosity(self) -> float:
        """The part of the voxels whose centre lies in a pore."""
        return self._pore_voxels / self.grey.size

    def add_pores(self, porosity: float, *, overlapping: bool) -> None:
        """Add pores until the porosity is reached or no place is found for another."""
        given_up = 0
        while given_up < GIVEN_UP:
            room = (porosity - self.porosity) * self.grey.size
            largest = min(RADII[1], np.cbrt(max(room, 0) * 3 / (4 * np.pi)))
            if largest < RADII[0]:
                return
            radius = self._rng.uniform(RADII[0], largest)
            centre = self._beside_another(radius) if overlapping else self._apart(radius)
            if centre is None:
                given_up += 1
            else:
                given_up = 0
                self._cut(centre, radius)

    def _apart(self, radius: float) -> NDArray[np.float64] | None:
        """Return a place that keeps a wall to all pores, or none if none was found."""
        places = self._rng.uniform(0, self.grey.shape[0] - 1, (TRIES, 3))
        for first in range(0, TRIES, 50):  # a few at a time: early on the first one fits
            some = places[first : first + 50]
            distances = cdist(some, self.centres)
            free = np.flatnonzero((distances >= self.radii + radius + WALL).all(axis=1))
            if free.size:
                place: NDArray[np.float64] = some[free[0]]
                return place
        return None

    def _beside_another(self, radius: float) -> NDArray[np.float64] | None:
        """Return a place where the pore overlaps one that is there, or none."""
        other = self._rng.integers(self.radii.size)
        direction = self._rng.standard_normal(3)
        reach = self._rng.uniform(0.75, 0.95) * (radius + self.radii[other])
        centre: NDArray[np.float64] = self.centres[other] + direction * reach / np.linalg.norm(
            direction
        )
        inside = centre.min() >= 0 and centre.max() <= self.grey.shape[0] - 1
        return centre if inside else None

    def _cut(self, centre: NDArray[np.float64], radius: float) -> None:
        """Cut one pore, looking only at the box around it."""
        low = np.maximum(np.floor(centre - radius - 1), 0).astype(int)
        high = np.ceil(centre + radius + 2).astype(int)
        box = self.grey[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        z, y, x = np.ogrid[tuple(slice(a, a + n) for a, n in zip(low, box.shape, strict=True))]
        distance = np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
        covered = np.clip(radius - distance + 0.5, 0, 1)  # of the voxel, by the pore
        middle = (self._metal + self._air) / 2
        before = int(np.count_nonzero(box <= middle))
        filled = self._metal - (self._metal - self._air) * covered
        np.minimum(box, filled.astype(box.dtype), out=box)
        self._pore_voxels += int(np.count_nonzero(box <= middle)) - before
        self.centres = np.vstack([self.centres, centre])
        self.radii = np.append(self.radii, radius)

    def add_noise(self) -> None:
        """Add Gaussian noise in place, slice by slice to need no second volume."""
        deviation = np.float32(NOISE * (self._metal - self._air))
        for plane in self.grey:
            noise = self._rng.standard_normal(plane.shape, dtype=np.float32)
            plane[:] = np.clip(np.rint(plane + deviation * noise), 0, 65_535)


def make_volume(kind: str, size: int, rng: np.random.Generator) -> Foam:
    """Return a volume of one kind, with noise."""
    foam = Foam(size, rng)
    porosity = rng.uniform(*POROSITY[kind])
    if kind == "mixed":
        foam.add_pores(porosity * SEPARATE_PART, overlapping=False)
        foam.add_pores(porosity, overlapping=True)
    else:
        foam.add_pores(porosity, overlapping=False)
    foam.add_noise()
    return foam


def choose_kinds(count: int, porous_share: float, overlap: float, seed: int) -> list[str]:
    """Return the kind of each volume, in random order but with the shares asked for."""
    porous = round(count * porous_share)
    mixed = round(porous * overlap)
    kinds = ["mixed"] * mixed + ["separate"] * (porous - mixed) + ["poor"] * (count - porous)
    np.random.default_rng(seed).shuffle(kinds)
    return kinds


def save(foam: Foam, truth: dict[str, object], volume: Path) -> None:
    """Write the truth, then the volume, which appears under its name only when whole."""
    volume.with_suffix(".json").write_text(json.dumps(truth, indent=1) + "\n")
    part = volume.with_suffix(".npy.part")
    try:
        with part.open("wb") as stream:
            np.save(stream, foam.grey)
        part.replace(volume)
    finally:
        part.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(
        description="Make artificial X-ray CT volumes of aluminium foam (16-bit .npy) with the "
        "truth about their pores (.json).",
        epilog="A volume takes 2 * SIZE**3 bytes: 12 of 128 are 50 MB; --count 100 --size 315 "
        "are 6.25 GB.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--into", type=Path, required=True, help="folder to write to; made if new")
    parser.add_argument("--count", type=int, default=12, help="number of volumes, 1 to 1000")
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge, 32 to 1024")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same volumes; 0 or more")
    parser.add_argument(
        "--porous-share", type=float, default=0.8, help="part of the volumes with enough pores"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.6, help="part of those in which pores also overlap"
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.count <= 1000:
        parser.error(f"--count is 1 to 1000, not {arguments.count}")
    if not 32 <= arguments.size <= 1024:
        parser.error(f"--size is 32 to 1024, not {arguments.size}")
    if arguments.seed < 0:
        parser.error(f"--seed is 0 or more, not {arguments.seed}")
    for name in ("porous_share", "overlap"):
        if not 0 <= getattr(arguments, name) <= 1:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is 0 to 1, not {getattr(arguments, name)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Make the volumes that are asked for, one after the other."""
    arguments = parse(argv)
    kinds = choose_kinds(arguments.count, arguments.porous_share, arguments.overlap, arguments.seed)
    try:
        arguments.into.mkdir(parents=True, exist_ok=True)
        for index, kind in enumerate(kinds):
            rng = np.random.default_rng([arguments.seed, index])
            foam = make_volume(kind, arguments.size, rng)
            volume = arguments.into / f"foam_{index:03}.npy"
            truth: dict[str, object] = {
                "volume": volume.stem,
                "kind": kind,
                "porosity": foam.porosity,
                "centres": foam.centres.tolist(),
                "radii": foam.radii.tolist(),
            }
            save(foam, truth, volume)
            print(
                f"{volume}  {kind:8}  porosity {foam.porosity:.3f}  {foam.radii.size:4} pores",
                flush=True,
            )
    except OSError as error:
        raise SystemExit(f"make_volumes: cannot write the volumes: {error}") from error


if __name__ == "__main__":
    main()
