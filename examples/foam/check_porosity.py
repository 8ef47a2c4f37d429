"""Decide from a sample of its voxels whether a CT volume of foam has enough pores to analyse.

A mixture of two Gaussians, dark air and bright metal, is fitted to the grey values of some 10 000
voxels. The weight of the darker one estimates the porosity; a volume is accepted if it reaches
the threshold. (The benchmark this follows looks at the larger of the two weights. In foam that is
mostly air that is the weight of the air; taken by the word it would also be large, and accept,
where there is next to no air at all.)

Two Gaussians can be fitted to anything, also to metal without a pore, where they share its one
peak about equally. So they count only if they lie apart: Ashman's D = √2 |μ₁ - μ₂| / √(σ₁² + σ₂²)
(Astronomical Journal 108, 1994) has to be above 2; otherwise the porosity is reported as 0.

Writes ``accepted/NAME.json`` or ``discarded/NAME.json`` and removes an earlier verdict that says
the opposite. Reads one sample, not the volume, so memory does not grow with the volume.
"""

from __future__ import annotations

import argparse
import json
import tokenize
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.integer]

SEPARATED = 2.0  # Ashman's D above which two components are told apart


def read_volume(path: Path) -> Grey:
    """Return the grey values, left on the disk until they are looked at."""
    try:
        volume = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise SystemExit(f"check_porosity: cannot read the volume {path}: {error}") from error
    if volume.ndim != 3 or volume.dtype.kind not in "iu":
        raise SystemExit(
            f"check_porosity: {path} is not a volume: expected whole grey values in 3 dimensions, "
            f"found {volume.dtype} in {volume.ndim}"
        )
    return volume


def estimate_porosity(volume: Grey, sample: int, seed: int) -> float:
    """Return the share of air among voxels drawn at random, 0 if air is not told apart."""
    from sklearn.mixture import GaussianMixture  # noqa: PLC0415 - takes seconds; --help need not

    rng = np.random.default_rng(seed)
    voxels = volume[tuple(rng.integers(0, length, sample) for length in volume.shape)]
    if voxels.min() == voxels.max():
        raise SystemExit(f"check_porosity: all sampled voxels have the grey value {voxels[0]}")
    mixture = GaussianMixture(2, random_state=seed).fit(voxels[:, None].astype(float))
    means = mixture.means_[:, 0]
    apart = np.sqrt(2) * np.ptp(means) / np.sqrt(mixture.covariances_.sum())
    return float(mixture.weights_[np.argmin(means)]) if apart > SEPARATED else 0.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(
        description="Estimate the porosity of a CT volume from a sample of its voxels and write "
        "accepted/NAME.json or discarded/NAME.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("volume", type=Path, help="grey values in 3 dimensions, .npy")
    parser.add_argument("--into", type=Path, required=True, help="folder to write to; made if new")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="porosity a volume needs, 0 to 1"
    )
    parser.add_argument("--sample", type=int, default=10_000, help="voxels to draw, 100 or more")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, 0 or more")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is 0 to 1, not {arguments.threshold}")
    if arguments.sample < 100:
        parser.error(f"--sample is 100 or more, not {arguments.sample}")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed is 0 to 2**32 - 1, not {arguments.seed}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Check one volume."""
    arguments = parse(argv)
    name = arguments.volume.stem
    porosity = estimate_porosity(read_volume(arguments.volume), arguments.sample, arguments.seed)
    accepted = porosity >= arguments.threshold
    verdict = {
        "volume": name,
        "accepted": accepted,
        "porosity": round(porosity, 4),
        "threshold": arguments.threshold,
        "sampled_voxels": arguments.sample,
    }
    folder, opposite = ("accepted", "discarded") if accepted else ("discarded", "accepted")
    try:
        (arguments.into / folder).mkdir(parents=True, exist_ok=True)
        (arguments.into / folder / f"{name}.json").write_text(json.dumps(verdict, indent=1) + "\n")
        (arguments.into / opposite / f"{name}.json").unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"check_porosity: cannot write the verdict: {error}") from error
    print(f"{name}  {folder}  porosity about {porosity:.3f}")


if __name__ == "__main__":
    main()
