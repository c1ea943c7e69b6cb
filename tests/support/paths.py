"""Where the repository and its fixtures are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
LAUNCH = ROOT / "launch"
PUBLISHED = ROOT / "tests" / "fixtures" / "llada_official_tiny"
