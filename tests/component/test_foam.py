"""The foam example finds what was put into its volumes, and fails cleanly where it cannot."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("foam")  # one worker: the libraries take seconds to import

ROOT = Path(__file__).parents[2]
FOAM = ROOT / "examples" / "foam"
STEPS = ("make_volumes", "check_porosity", "segment", "analyse_pores", "summarise")


def load(name: str) -> ModuleType:
    """Import one script from where it lies, without putting its folder on the path."""
    spec = importlib.util.spec_from_file_location(f"foam_{name}", FOAM / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_volumes, check_porosity, segment, analyse_pores, summarise = map(load, STEPS)


def make(into: Path, *, size: int, count: int = 3, seed: int = 5) -> list[Path]:
    flags = ["--size", size, "--count", count, "--seed", seed, "--porous-share", 0.67]
    make_volumes.main(["--into", str(into), "--overlap", "0.5", *map(str, flags)])
    return sorted(into.glob("*.npy"))


def truth_of(volume: Path) -> dict:
    return json.loads(volume.with_suffix(".json").read_text())


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> dict[str, Path]:
    """One volume of each kind."""
    made = make(tmp_path_factory.mktemp("volumes"), size=96)
    return {truth_of(volume)["kind"]: volume for volume in made}


@pytest.fixture(scope="module")
def results(volumes, tmp_path_factory) -> Path:
    """The results of all steps for the volumes with enough pores, and the check of all."""
    into = tmp_path_factory.mktemp("results")
    for kind, volume in volumes.items():
        check_porosity.main([str(volume), "--into", str(into)])
        if kind != "poor":
            segment.main([str(volume), "--into", str(into)])
            segmented = into / f"{volume.stem}_segmented.npy"
            analyse_pores.main([str(segmented), "--volume", str(volume), "--into", str(into)])
    summarise.main([str(into), "--into", str(into)])
    return into


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float):
    z, y, x = np.ogrid[tuple(map(slice, shape))]
    return (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius**2


def analyse(pores: np.ndarray, folder: Path) -> dict:
    np.save(folder / "v.npy", np.where(pores, 8000, 30_000).astype(np.uint16))
    np.save(folder / "v_segmented.npy", pores.astype(np.uint8))
    analyse_pores.main(
        [f"{folder}/v_segmented.npy", "--volume", f"{folder}/v.npy", "--into", str(folder)]
    )
    return json.loads((folder / "v_pores.json").read_text())


class TestVolumes:
    def test_same_seed_gives_same_bytes(self, tmp_path):
        """A published result can be repeated from the seed alone."""
        first = [path.read_bytes() for path in make(tmp_path / "a", size=48, seed=3)]
        again = [path.read_bytes() for path in make(tmp_path / "b", size=48, seed=3)]
        other = [path.read_bytes() for path in make(tmp_path / "c", size=48, seed=4)]
        assert first == again
        assert len({*first, *other}) == 6

    def test_volumes_are_16_bit_cubes_and_nothing_half_written_is_left(self, volumes):
        """Later steps and storage sizes rely on the format."""
        folder = volumes["poor"].parent
        assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}
        for volume in volumes.values():
            grey = np.load(volume)
            assert (grey.dtype, grey.shape) == (np.uint16, (96, 96, 96))

    @pytest.mark.parametrize("kind", ["separate", "mixed", "poor"])
    def test_truth_is_true(self, volumes, kind):
        """The porosity in the truth is that of its spheres, drawn here in another way."""
        truth = truth_of(volumes[kind])
        mask = np.zeros((96, 96, 96), bool)
        for centre, radius in zip(truth["centres"], truth["radii"], strict=True):
            mask |= ball(mask.shape, centre, radius)
        assert truth["porosity"] == pytest.approx(mask.mean(), abs=5e-4)
        low, high = make_volumes.POROSITY[kind]
        assert low * 0.75 < truth["porosity"] < high * 1.25
        grey = np.load(volumes[kind])
        assert grey[mask].mean() < grey[~mask].mean() / 2

    def test_pores_overlap_only_where_they_should(self, volumes):
        """A mixed volume has both kinds of pores, the others keep a wall between them."""
        for kind, volume in volumes.items():
            truth = truth_of(volume)
            centres, radii = np.array(truth["centres"]), np.array(truth["radii"])
            walls = np.linalg.norm(centres[:, None] - centres, axis=2) - radii[:, None] - radii
            np.fill_diagonal(walls, np.inf)
            nearest = walls.min(axis=1)
            if kind == "mixed":
                assert (nearest < 0).any()
                assert (nearest > 0).any()
            else:
                assert (nearest >= make_volumes.WALL).all()

    def test_shares_of_the_kinds_are_exact(self):
        """A hundred volumes have exactly the twenty poor ones of the benchmark."""
        kinds = make_volumes.choose_kinds(100, 0.8, 0.6, seed=1)
        assert [kinds.count(kind) for kind in ("poor", "mixed", "separate")] == [20, 48, 32]
        assert kinds != sorted(kinds)

    @pytest.mark.parametrize(
        "flags", ["--count 0", "--size 31", "--seed -1", "--porous-share 1.1", "--overlap nan"]
    )
    def test_absurd_arguments_are_refused(self, tmp_path, capsys, flags):
        """A wrong number is named, with what is allowed, before anything is written."""
        with pytest.raises(SystemExit) as ended:
            make_volumes.main(["--into", str(tmp_path), *flags.split()])
        assert ended.value.code == 2
        assert f"{flags.split()[0]} is " in capsys.readouterr().err
        assert not files_in(tmp_path)


class TestCheck:
    def test_only_volumes_with_too_few_pores_are_discarded(self, volumes, results):
        """The verdict is right for every kind and its porosity near the truth."""
        for kind, volume in volumes.items():
            folder = "discarded" if kind == "poor" else "accepted"
            verdict = json.loads((results / folder / f"{volume.stem}.json").read_text())
            assert verdict["accepted"] is (kind != "poor")
            assert verdict["porosity"] == pytest.approx(truth_of(volume)["porosity"], abs=0.02)
        assert len(files_in(results / "accepted") + files_in(results / "discarded")) == 3

    @pytest.mark.parametrize("seed", range(3))
    def test_metal_without_pores_has_no_porosity(self, seed):
        """Two Gaussians fitted to one peak of noise are not taken for air and metal."""
        noise = np.random.default_rng(seed).normal(36_000, 4_000, (40, 40, 40))
        assert check_porosity.estimate_porosity(noise.astype(np.uint16), 10_000, seed) == 0

    def test_new_verdict_replaces_the_opposite_one(self, volumes, tmp_path):
        """A volume that is uploaded or checked again never has two verdicts."""
        for threshold in ("0", "0.9"):
            check_porosity.main(
                [str(volumes["mixed"]), "--into", str(tmp_path), "--threshold", threshold]
            )
        (verdict,) = files_in(tmp_path)
        assert verdict.parent.name == "discarded"

    @pytest.mark.parametrize("flags", ["--threshold 1.5", "--sample 10", "--seed -1"])
    def test_absurd_arguments_are_refused(self, volumes, tmp_path, capsys, flags):
        """A wrong number is named, with what is allowed, before anything is written."""
        with pytest.raises(SystemExit) as ended:
            check_porosity.main([str(volumes["poor"]), "--into", str(tmp_path), *flags.split()])
        assert ended.value.code == 2
        assert f"{flags.split()[0]} is " in capsys.readouterr().err
        assert not files_in(tmp_path)


class TestSegmentation:
    @pytest.mark.parametrize("kind", ["separate", "mixed"])
    def test_voxels_are_told_apart(self, volumes, results, kind):
        """The pores are where the spheres are: porosity within 0.02, few voxels wrong."""
        truth = truth_of(volumes[kind])
        segmented = np.load(results / f"{volumes[kind].stem}_segmented.npy")
        mask = np.zeros(segmented.shape, bool)
        for centre, radius in zip(truth["centres"], truth["radii"], strict=True):
            mask |= ball(mask.shape, centre, radius)
        assert segmented.dtype == np.uint8
        assert segmented.mean() == pytest.approx(truth["porosity"], abs=0.02)
        assert np.mean(segmented != mask) < 0.025

    def test_strong_noise_is_filtered_away(self):
        """Noise that puts one voxel in twenty on the wrong side leaves the pores as they are."""
        pores = ball((40, 40, 40), (20, 20, 20), 12)
        noise = np.random.default_rng(0).normal(0, 6_000, pores.shape)
        volume = (np.where(pores, 20_000, 40_000) + noise).astype(np.uint16)
        assert np.mean((volume < 30_000) != pores) > 0.04
        found = segment.find_pores(volume)
        assert found[ball(pores.shape, (20, 20, 20), 10)].all()
        assert not found[~ball(pores.shape, (20, 20, 20), 14)].any()

    def test_nothing_is_lost_or_made_at_the_faces(self):
        """Closing the metal treats a pore at the face of the volume as one inside."""
        pores = ball((40, 40, 40), (0, 20, 20), 8) | ball((40, 40, 40), (28, 20, 20), 8)
        volume = np.where(pores, 8000, 36_000).astype(np.uint16)
        found = segment.find_pores(volume)
        assert found[0].sum() == pytest.approx(pores[0].sum(), rel=0.06)
        assert not found[:, 0].any()

    def test_full_disk_leaves_no_segmented_volume(self, volumes, tmp_path, monkeypatch):
        """A file that could not be written whole is not there at all."""

        def full(stream, _array):
            stream.write(b"some")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "save", full)
        with pytest.raises(SystemExit, match="No space left"):
            segment.main([str(volumes["poor"]), "--into", str(tmp_path)])
        assert not files_in(tmp_path)


class TestPores:
    def test_separate_pores_are_all_found_with_their_radii(self, volumes, results):
        """Where no pores overlap the number is exact, the mean radius right within 0.2 voxels."""
        truth = truth_of(volumes["separate"])
        found = json.loads((results / f"{volumes['separate'].stem}_pores.json").read_text())
        centres, radii = np.array(truth["centres"]), np.array(truth["radii"])
        reach = np.minimum(centres, 95 - centres).min(axis=1) - radii
        assert found["number_of_pores"] == len(radii)
        # A pore that only just touches a face is seen as cut or as whole.
        assert np.sum(reach > 1) <= len(found["radii"]) <= np.sum(reach > -1)
        assert found["mean_radius"] == pytest.approx(radii[reach > 0].mean(), abs=0.2)
        assert found["porosity"] == pytest.approx(truth["porosity"], abs=0.02)

    def test_overlapping_pores_are_parted(self, volumes, results):
        """Where pores overlap, most are found and their mean radius is right within a voxel."""
        truth = truth_of(volumes["mixed"])
        found = json.loads((results / f"{volumes['mixed'].stem}_pores.json").read_text())
        assert 0.7 * len(truth["radii"]) < found["number_of_pores"] <= len(truth["radii"])
        assert found["mean_radius"] == pytest.approx(np.mean(truth["radii"]), abs=1)
        assert found["porosity"] == pytest.approx(truth["porosity"], abs=0.02)

    def test_radius_is_that_of_the_sphere(self, tmp_path):
        """Two spheres that overlap a little are two pores; each has its own radius in voxels."""
        pores = ball((40, 40, 60), (20, 20, 18), 10) | ball((40, 40, 60), (20, 20, 34), 7)
        found = analyse(pores, tmp_path)
        assert found["number_of_pores"] == 2
        assert found["radii"] == pytest.approx([7, 10], abs=0.2)

    def test_pores_cut_by_a_face_count_but_have_no_radius(self, tmp_path):
        """The statistic of radii is not spoilt by pieces of pores."""
        pores = ball((40, 40, 40), (20, 20, 20), 9) | ball((40, 40, 40), (20, 20, 1), 6)
        found = analyse(pores, tmp_path)
        assert found["number_of_pores"] == 2
        assert found["radii"] == pytest.approx([9], abs=0.1)

    def test_volume_without_pores_is_a_result(self, tmp_path):
        """No pores is an answer: no mean radius, and a figure all the same."""
        found = analyse(np.zeros((20, 20, 20), bool), tmp_path)
        assert (found["number_of_pores"], found["mean_radius"], found["radii"]) == (0, None, [])
        assert (tmp_path / "v_pores.png").stat().st_size > 0

    def test_figure_is_a_png(self, volumes, results):
        """The figure can be looked at anywhere."""
        figure = results / f"{volumes['mixed'].stem}_pores.png"
        assert figure.read_bytes().startswith(b"\x89PNG\r\n")

    def test_inputs_that_do_not_belong_together_are_refused(self, volumes, tmp_path):
        """A mix-up of files is told, not analysed."""
        volume = str(volumes["poor"])
        with pytest.raises(SystemExit, match="not a segmented volume: expected 0"):
            analyse_pores.main([volume, "--volume", volume, "--into", str(tmp_path / "out")])
        np.save(tmp_path / "small.npy", np.zeros((4, 4, 4), np.uint8))
        with pytest.raises(SystemExit, match="do not belong together"):
            analyse_pores.main(
                [f"{tmp_path}/small.npy", "--volume", volume, "--into", str(tmp_path / "out")]
            )
        assert not (tmp_path / "out").exists()


class TestSummary:
    def test_every_volume_has_a_row(self, volumes, results):
        """The table says of each volume what is known, sorted by name."""
        with (results / "summary.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert list(rows[0]) == list(summarise.COLUMNS)
        assert [row["volume"] for row in rows] == sorted(v.stem for v in volumes.values())
        for row in rows:
            if row["volume"] == volumes["poor"].stem:
                assert (row["accepted"], row["number_of_pores"]) == ("False", "")
            else:
                found = json.loads((results / f"{row['volume']}_pores.json").read_text())
                assert row["accepted"] == "True"
                for column in ("porosity", "number_of_pores", "mean_radius"):
                    assert float(row[column]) == found[column]

    def test_results_may_lie_in_folders_of_their_own(self, tmp_path):
        """Jobs that each fetch into their own folder are gathered like any."""
        for name in ("b", "a"):
            folder = tmp_path / "in" / name / "accepted"
            folder.mkdir(parents=True)
            verdict = {"volume": name, "accepted": True, "porosity": 0.2}
            (folder / f"{name}.json").write_text(json.dumps(verdict))
        summarise.main([str(tmp_path / "in"), "--into", str(tmp_path / "out")])
        written = (tmp_path / "out" / "summary.csv").read_text().splitlines()[1:]
        assert written == ["a,True,0.2,,", "b,True,0.2,,"]

    def test_what_cannot_be_summarised_is_named(self, tmp_path):
        """Nothing there, a broken file and two verdicts on one volume are told apart."""
        out = ["--into", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match="is not a folder"):
            summarise.main([str(tmp_path / "none"), *out])
        with pytest.raises(SystemExit, match="no results in"):
            summarise.main([str(tmp_path), *out])
        for folder in ("accepted", "discarded"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.json").write_text('{"volume": "x", "accepted": true}')
        with pytest.raises(SystemExit, match="another verdict on x"):
            summarise.main([str(tmp_path), *out])
        (tmp_path / "accepted" / "x.json").write_text('{"volume":')
        with pytest.raises(SystemExit, match=r"accepted/x\.json is not a result"):
            summarise.main([str(tmp_path), *out])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [check_porosity, segment])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("truncated", "cannot read the volume"),
        ("empty", "cannot read the volume"),
        ("text", "magic string is not correct"),
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("flat", "found uint16 in 2"),
        ("fractions", "found float64 in 3"),
        ("constant", "grey value"),
    ],
)
def test_wrong_volume_is_refused_with_its_cause(tmp_path, step, damage, cause):
    """A damaged volume gets a message that names it and what is wrong, and no result."""
    volume = tmp_path / "volume.npy"
    grey = np.full((8, 8, 8), 7, np.uint16)
    array = {"flat": grey[0], "fractions": grey.astype(float)}.get(damage, grey)
    if damage == "folder":
        volume.mkdir()
    elif damage != "missing":
        np.save(volume, array)
        whole = volume.read_bytes()
        damaged = {"truncated": whole[:-100], "empty": b"", "text": b"not an array, but long"}
        volume.write_bytes(damaged.get(damage, whole))
    with pytest.raises(SystemExit) as ended:
        step.main([str(volume), "--into", str(tmp_path / "out")])
    assert cause in ended.value.code
    assert damage == "constant" or str(volume) in ended.value.code
    assert not (tmp_path / "out").exists()


def test_commands_of_the_readme_work_and_a_corrupt_volume_fails_alone(tmp_path):
    """As programs, by hand: the six commands do what they say; a bad upload harms no other."""
    readme = (FOAM / "README.md").read_text()
    block = re.search(r"```console\n(.*?)```", readme, re.DOTALL).group(1).splitlines()
    commands = [shlex.split(line) for line in block if line.startswith("python ")]
    assert [Path(command[1]).stem for command in commands] == list(STEPS)
    for _, script, *arguments in commands:
        subprocess.run([sys.executable, ROOT / script, *arguments], cwd=tmp_path, check=True)
        if script.endswith("make_volumes.py"):
            bad = tmp_path / "volumes" / "foam_001.npy"
            bad.write_bytes(bad.read_bytes()[:100_000])
            ended = subprocess.run(
                [sys.executable, FOAM / "check_porosity.py", bad, "--into", tmp_path / "results"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert ended.returncode == 1
            assert ended.stderr.startswith(f"check_porosity: cannot read the volume {bad}: ")
            assert ended.stderr.count("\n") == 1
            assert not (tmp_path / "results").exists()
    assert len(list((tmp_path / "volumes").glob("*.npy"))) == 12
    assert (tmp_path / "results" / "foam_000_pores.png").exists()
    with (tmp_path / "results" / "summary.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["volume"], row["accepted"]) == ("foam_000", "True")
    truth = truth_of(tmp_path / "volumes" / "foam_000.npy")
    assert int(row["number_of_pores"]) == len(truth["radii"])  # it is one without overlaps


def test_scripts_know_nothing_of_the_grid():
    """The same unchanged analysis runs anywhere: the scripts need no part of this project."""
    for step in STEPS:
        assert "gridcloud" not in (FOAM / f"{step}.py").read_text()
