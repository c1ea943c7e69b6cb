"""Fresh processes with one of the two versions of transformers that an export must work in, and
without this package.

"installed" is the one of the environment (the newest 5.x, in the dev extra); "4.49.0", which the
published evaluation scripts pin, lies in a directory of its own next to it and borrows torch, numpy
and the rest.
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.required import absent

VERSIONS = ("4.49.0", "installed")
PINS = {
    "4.49.0": (
        "transformers==4.49.0",
        "tokenizers==0.21.4",
        "huggingface_hub==0.36.2",
        "requests==2.34.2",
        "charset_normalizer==3.5.2",
        "urllib3==2.8.0",
        "certifi",
        "idna",
    )
}

# None in sys.modules makes an import fail: neither this package nor JAX may be needed.
WITHOUT_US = (
    "import sys; sys.modules['llada_jax'] = sys.modules['jax'] = sys.modules['flax'] = None\n"
)


def transformers_site(version: str) -> Path | None:
    """Returns the directory to put first on PYTHONPATH for a version; None for the installed one.

    Installs it on first use.
    """
    if version == "installed":
        if (
            importlib.util.find_spec("transformers") is None
            or importlib.util.find_spec("torch") is None
        ):
            absent("torch or transformers is not installed: pip install 'llada_jax[dev]'")
        return None
    directory = Path(sys.prefix) / f"transformers-{version}"
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist install it once
        if not directory.exists():
            unfinished = directory.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(unfinished),
            ]
            result = subprocess.run([*command, *PINS[version]], capture_output=True, text=True)
            if result.returncode:
                absent(f"transformers {version} cannot be installed: {result.stderr[-300:]}")
            unfinished.rename(directory)
    return directory


def run_python(version: str, code: str, *args, home: Path, timeout: float = 300) -> str:
    """Runs `code` with sys.argv[1:] = args in a fresh process of a version, offline, and returns
    its stdout.

    Args:
        home: a scratch directory; transformers keeps its copies of modeling files there.
    """
    site = transformers_site(version)
    environment = {
        **os.environ,
        "PYTHONPATH": str(site or ""),
        "HF_HOME": str(Path(home) / f"hf-{version}"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # tiny models, shared cores
    }
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_US + code, *map(str, args)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout
