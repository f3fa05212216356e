"""``python -m handbook``: build the site, strictly."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from handbook.staging import stage
from pdserve.errors import ConfigError, PdserveError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
BUILD_S_MAX = 300


def build() -> int:
    """The exit status: 1 where a link or an anchor leads nowhere.

    Raises:
        ConfigError: the generator is not installed, or a page cannot be made.
    """
    if importlib.util.find_spec("zensical") is None:
        raise ConfigError('zensical is not installed; "make setup-dev" installs it')
    begun_s = time.monotonic()
    pages = stage(ROOT, PAGES)
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    ran = subprocess.run(command, cwd=ROOT, timeout=BUILD_S_MAX, check=False)
    if ran.returncode == 0:
        took_s = time.monotonic() - begun_s
        print(f"{len(pages)} pages in {SITE.relative_to(ROOT)}/, {took_s:.1f} s")
    return ran.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages-only", action="store_true", help="write the Markdown, no HTML")
    wish = parser.parse_args()
    try:
        if wish.pages_only:
            print(f"{len(stage(ROOT, PAGES))} pages in {PAGES.relative_to(ROOT)}/")
            return 0
        return build()
    except PdserveError as error:
        print(f"handbook: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
