"""Bad input at the command line: one clear error, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.site_client.slides.process import envelope, run

COMMITTED = Path(__file__).resolve().parents[2] / "hostile"


def prepare(tmp_path: Path, hostile: Path, name: str) -> Path:
    slides = tmp_path / "slides"
    slides.mkdir()
    source = hostile / name if (hostile / name).exists() else COMMITTED / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, slides / name)
    (slides / "slides.csv").write_text(f"file,patient\n{name},P1\n")
    return slides


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("not_a_slide.svs", "not-a-slide"),
        ("zero_byte.svs", "slide-empty"),
        ("truncated.tiff", "slide-truncated"),
        ("no_mpp.tiff", "mpp-missing"),
        ("tinted_spots.tiff", "no-tissue"),
    ],
)
def test_each_hostile_slide_gets_one_clear_error(tmp_path: Path, hostile: Path, name: str, code: str) -> None:
    slides = prepare(tmp_path, hostile, name)
    done = run("data", "add", "--site-dir", tmp_path / "site", "--slides", slides, "--format", "json")
    body = envelope(done)
    assert done.returncode == 4 and body["status"] == "error" and body["code"] == code
    assert name in body["message"] and body["hint"]
    assert done.stderr.count("error [") == 1 and "Traceback" not in done.stderr
    shown = run("data", "show", "--site-dir", tmp_path / "site", "--format", "json")
    assert envelope(shown)["data"]["slides"] == 0


def test_a_typo_in_the_list_and_a_missing_site(tmp_path: Path) -> None:
    shutil.copy(COMMITTED / "unknown_column.csv", tmp_path / "slides.csv")
    done = run("data", "add", "--site-dir", tmp_path / "site", "--slides", tmp_path)
    assert done.returncode == 4 and "Did you mean 'patient'?" in done.stderr and not done.stdout
    for verb in ("show", "split"):
        done = run("data", verb, "--site-dir", tmp_path / "nowhere")
        assert done.returncode == 4 and "no-catalogue" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_the_whole_road_and_its_refusals(tmp_path: Path) -> None:
    site = tmp_path / "site"
    made = run("data", "synthesise", "--site-dir", site, "--patients", 5, "--seed", 2, "--size", 512)
    assert made.returncode == 0, made.stderr
    again = run("data", "synthesise", "--site-dir", site, "--patients", 5, "--seed", 3, "--size", 512)
    assert again.returncode == 4 and "recipe-differs" in again.stderr
    assert run("data", "add", "--site-dir", site, "--slides", site / "slides").returncode == 0
    early = run("features", "--site-dir", site)
    assert early.returncode == 1 and "split-missing" in early.stderr
    split = run("data", "split", "--site-dir", site, "--holdout-fraction", 0.4, "--format", "json")
    assert envelope(split)["data"]["holdout"] == 2
    assert run("data", "split", "--site-dir", site).returncode == 1
    tiled = envelope(run("data", "tile", "--site-dir", site, "--format", "json"))["data"]
    assert tiled["made"] == tiled["total"] > 40 and tiled["without_tiles"] == 0
    assert run("data", "check", "--site-dir", site, "--deep").returncode == 0
    sheet = tmp_path / "sheet.png"
    shown = run("data", "show", "--site-dir", site, "--sheet", sheet, "--format", "json")
    assert envelope(shown)["data"]["tiles"] and sheet.stat().st_size > 50_000
    (site / "slides" / "slide-0003.tiff").write_bytes(b"")
    broken = run("data", "check", "--site-dir", site, "--format", "json")
    assert broken.returncode == 1 and envelope(broken)["data"]["problems"][0]["code"] == "slide-empty"


def small_disk(folder: Path, kibibytes: int) -> list[str] | None:
    """A prefix that mounts a real, small file system at `folder` in a name space of its own; None if forbidden."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = f'mount -t tmpfs -o size={kibibytes}k none "{folder}"'
    prefix = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        f'{mount} && "$@"; code=$?; cp -r "{folder}" "{folder}.seen"; exit $code',
        "-",
    ]
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    shutil.rmtree(f"{folder}.seen", ignore_errors=True)
    return prefix if allowed else None


def test_a_full_disk_while_slides_are_written(tmp_path: Path) -> None:
    site = tmp_path / "site"
    prefix = small_disk(site, 700)
    words = ("data", "synthesise", "--site-dir", site, "--patients", 8, "--size", 512, "--seed", 1)
    if prefix is None:  # no mounts here: the kernel's file-size limit stops the writes instead
        prefix = ["sh", "-c", 'ulimit -f 100; exec "$@"', "-"]
    done = run(*words, prefix=prefix)
    assert done.returncode == 1 and "disk-full" in done.stderr and "Traceback" not in done.stderr
    left = Path(f"{site}.seen") if Path(f"{site}.seen").exists() else site
    assert not list(left.rglob("*.partial")) and not (left / "slides" / "slides.csv").exists()
    import openslide

    for slide in (left / "slides").glob("*.tiff"):
        with openslide.OpenSlide(str(slide)) as whole:
            whole.read_region((0, 0), 0, whole.dimensions).load()


def test_a_full_disk_while_the_catalogue_is_written(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    assert run("data", "synthesise", "--site-dir", tmp_path, "--patients", 3, "--size", 512).returncode == 0
    site = tmp_path / "site"
    words = ("data", "add", "--site-dir", site, "--slides", slides)
    done = run(*words, prefix=["sh", "-c", 'ulimit -f 24; exec "$@"', "-"])
    assert done.returncode == 1 and "disk-full" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert run(*words).returncode == 0
